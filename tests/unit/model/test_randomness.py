"""Random numbers of a measurement come from streams of its own; those of others stay untouched."""

import random
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.model.randomness import HostStreams, PrivateRandomness, undo_own_draws
from fimprobe.model.runs import same_randomness
from tests.support.bit_identity import same, streams

X = torch.full((4, 3), 0.5)

DRAWS = {
    "rand": lambda: torch.rand(3, 2),
    "randn": lambda: torch.randn(3, dtype=torch.float64),
    "randint": lambda: torch.randint(0, 100, (5,)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 0, 100),
    "normal": lambda: torch.normal(X, X),
    "in place": lambda: [
        torch.zeros(3).uniform_(), torch.zeros(3).normal_(), torch.zeros(3).exponential_(),
        torch.zeros(3).geometric_(0.5), torch.zeros(3).cauchy_(), torch.zeros(3).log_normal_(),
        torch.zeros(3).random_(), torch.zeros(3).bernoulli_(0.5),
    ],
    "bernoulli": lambda: [torch.bernoulli(X), torch.bernoulli(X, 0.3)],
    "multinomial": lambda: torch.multinomial(X, 2),
    "poisson": lambda: torch.poisson(4 * X),
    "distribution": lambda: torch.distributions.Gamma(X, X).sample(),
    "dropout": lambda: F.dropout(X),
    "native dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "alpha dropout": lambda: F.alpha_dropout(X, training=True),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "gumbel": lambda: F.gumbel_softmax(X),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "initialisation": lambda: nn.Linear(3, 2).weight.detach(),
    "global generator": lambda: torch.rand(3, generator=torch.default_generator),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_torch_draws_from_another_stream(draw):
    before = torch.get_rng_state()
    values = []
    for seed in (1, 1, 2):
        with PrivateRandomness(seed) as private:
            values.append(draw())
        assert private.drew and torch.equal(before, torch.get_rng_state())
    assert same(values[0], values[1]) and not same(values[0], values[2])


def test_what_draws_nothing_is_not_a_draw():
    own = torch.Generator().manual_seed(3)
    lstm = nn.LSTM(3, 2, num_layers=2, dropout=0.5).eval()
    with PrivateRandomness(0) as private:
        given = torch.rand(3, generator=own)
        F.rrelu(X), F.dropout(X, 0.5, training=False), torch.native_dropout(X, 0.5, False)
        F.scaled_dot_product_attention(X, X, X), lstm(X)
    assert not private.drew and torch.equal(given, torch.rand(3, generator=own.manual_seed(3)))


def test_a_draw_under_vmap_and_its_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    before = torch.get_rng_state()
    with PrivateRandomness(0):
        y = torch.func.vmap(lambda v: v * torch.rand_like(v), randomness="different")(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient * x, y) and torch.equal(before, torch.get_rng_state())


def test_other_threads_draw_from_the_global_stream():
    def drawn(private):
        torch.manual_seed(5)
        numbers, started, ended = [], threading.Event(), threading.Event()

        def draw():
            started.wait(10)
            numbers.extend(torch.rand(()).item() for _ in range(3))
            ended.set()

        thread = threading.Thread(target=draw)
        thread.start()
        with PrivateRandomness(0) if private else same_randomness():
            torch.rand(2)
            started.set()
            ended.wait(10)
        thread.join()
        return numbers

    torch.manual_seed(5)
    expected = [torch.rand(()).item() for _ in range(3)]
    assert drawn(True) == drawn(False) == expected


@pytest.mark.parametrize("draw", [random.random, random.gauss, np.random.rand, np.random.randn])
def test_draws_of_a_run_are_undone(draw):
    before, state = HostStreams.read(), streams()
    draw()
    assert undo_own_draws(before, draw) and same(streams(), state)
    assert not undo_own_draws(before, draw)  # nothing moved


def test_draws_of_others_are_kept():
    before = HostStreams.read()
    random.random()  # another thread
    after = HostStreams.read()
    assert not undo_own_draws(before, lambda: None) and HostStreams.read().key == after.key
    stopped = threading.Event()

    def keep_drawing():
        while not stopped.is_set():
            random.random()
            time.sleep(1e-4)

    thread = threading.Thread(target=keep_drawing)
    thread.start()
    try:
        assert not undo_own_draws(before, lambda: time.sleep(0.01))
        assert not undo_own_draws(before, random.random)
    finally:
        stopped.set()
        thread.join()


def test_draws_of_varying_number_are_undone():
    """Rejection sampling takes another number of words in every run."""
    before, state = HostStreams.read(), streams()
    pieces = iter(range(1, 100))
    random.random()
    assert undo_own_draws(before, lambda: [random.random() for _ in range(next(pieces))])
    assert same(streams(), state)


class Noisy(nn.Module):
    """Draws random numbers in eval mode, which do not change its outputs."""

    def __init__(self, draw):
        super().__init__()
        self.net, self.draw = nn.Linear(3, 2), draw

    def forward(self, x):
        return self.net(x) + 0 * float(torch.as_tensor(self.draw()).sum())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(2),
        lambda: random.random(),
        lambda: random.gauss(),
        lambda: np.random.rand(),
        lambda: np.random.randn(),
        random.random,  # the methods of objects, which the twin copies
        np.random.rand,
    ],
    ids=["torch", "random", "gauss", "rand", "randn", "method", "method of numpy"],
)
def test_a_model_that_draws_in_eval_mode_moves_no_stream(draw):
    model, state = Noisy(draw), streams()
    fimprobe.measure(model, torch.randn(5, 3, generator=torch.Generator()), likelihood="categorical")
    assert same(streams(), state)


def test_a_generator_that_the_model_holds_moves_with_the_training_only():
    held = np.random.default_rng(1), np.random.RandomState(1), random.Random(1), torch.Generator()

    class Holds(Noisy):
        def forward(self, x):
            rng, legacy, python, generator = self.held
            draws = rng.random(), legacy.rand(), python.random(), torch.rand(1, generator=generator)
            return self.net(x) + 0 * float(sum(map(float, draws)))

    model = Holds(None)
    model.held = held

    def states():
        rng, legacy, python, generator = held
        state = legacy.get_state()
        return (
            rng.bit_generator.state,
            state[1].tolist(),
            state[2],
            python.getstate(),
            generator.get_state(),
        )

    before = states()
    fimprobe.measure(model, torch.randn(5, 3), likelihood="categorical")
    assert same(states(), before)


class Sampling(fimprobe.likelihoods.Categorical):
    """A family of a user that draws from the global stream."""

    def quantile(self, outputs, uniforms):
        torch.rand(3)
        return super().quantile(outputs, uniforms)


def test_a_family_that_draws_moves_no_stream():
    net, x = Noisy(lambda: 0.0), torch.randn(5, 3)
    state = streams()
    fimprobe.measure(net, x, likelihood=Sampling(), label_sampling="model")
    assert same(streams(), state)


def test_batches_of_another_thread_stay_the_same():
    def trained(probed):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        batches = []

        def make():
            for _ in range(4):
                rows = []
                for _ in range(8):
                    time.sleep(0.001)  # reads a file
                    rows.append(torch.randn(3) * random.random() * float(np.random.rand()))
                batches.append(torch.stack(rows))

        probe = None
        if probed:
            probe = fimprobe.attach(
                net, schedule={"every": 1}, likelihood="categorical", tensorboard=False
            )
        maker = threading.Thread(target=make)
        maker.start()
        for i in range(4):
            while len(batches) <= i:
                time.sleep(0.001)
            optimizer.zero_grad()
            F.cross_entropy(net(batches[i]), torch.arange(8) % 3).backward()
            optimizer.step()
        maker.join()
        if probe is not None:
            assert len(probe.history) == 4
            probe.detach()
        return batches, net.state_dict(), streams()

    assert same(trained(False), trained(True))
