"""What a copy cannot be is refused in words that name it, and a changed model is compared again."""

import copy
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimprobe import FimprobeError, measure
from fimprobe.engines.tracing.plan import Plan
from fimprobe.model import checked_twin
from fimprobe.model.batch import Batch
from fimprobe.model.checked_twin import compute_fingerprint, make_checked_twin
from fimprobe.model.copies.copy_traits import is_plain_data
from fimprobe.model.copies.object_copies import ObjectCopier
from fimprobe.model.outputs import select_outputs
from fimprobe.model.runs import same_randomness
from fimprobe.model.twin import make_twin
from tests.models.cases import Lambda

FACTORS = {}


class ReadsAGlobal(nn.Module):
    """Its forward, a method of the class, reads a module from a global variable."""

    def __init__(self):
        super().__init__()
        global outside
        self.net = outside = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        return outside(x)


class WritesAGlobal(nn.Module):
    """Its forward changes an attribute of the model through a global variable."""

    def __init__(self):
        super().__init__()
        global outside
        self.net, self.calls = nn.Linear(4, 3), []
        outside = self

    def forward(self, x):
        outside.calls.append(1)
        return self.net(x)


def cached():
    def forward(self, x):
        if self.cache is None:
            self.cache = self.v / self.v.norm()
        return self.out(F.linear(x, self.cache).tanh())

    model = Lambda(forward, v=nn.Parameter(torch.randn(4, 4)), out=nn.Linear(4, 3), cache=None)
    model(torch.randn(2, 4))
    return model


def looked_up_by_identity():
    def forward(self, x):
        return self.net(x) * FACTORS[id(self.net)]

    model = Lambda(forward, net=nn.Linear(4, 3))
    FACTORS[id(model.net)] = 2.0
    return model


def looked_up_with_a_default():
    def forward(self, x):
        return self.net(x) * FACTORS.get(id(self.net), 1.0)

    model = Lambda(forward, net=nn.Linear(4, 3))
    FACTORS[id(model.net)] = 2.0
    return model


def reading_a_generator():
    model = Lambda(lambda self, x: self.net(x) * next(self.values), net=nn.Linear(4, 3))
    model.values = (float(i + 1) for i in range(100))
    return model


def drawing_from_its_own_stream():
    def forward(self, x):
        return self.net(x) + torch.randn(3, generator=self.stream)

    return Lambda(forward, net=nn.Linear(4, 3), stream=torch.Generator().manual_seed(1))


def noisy_and_probabilities_in_evaluation():
    def forward(self, x):
        h = F.dropout(self.net(x), 0.5, self.training)
        return h if self.training else h.softmax(-1)

    return Lambda(forward, net=nn.Linear(4, 3))


def noisy_and_detached_in_evaluation():
    def forward(self, x):
        h = F.dropout(self.a(x), 0.5, self.training)
        return self.b(h if self.training else h.detach())

    return Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def of_another_shape_in_training():
    def forward(self, x):
        h = self.net(x) + (torch.rand(()) if self.training else 0)
        return h[:, :2] if self.training else h

    return Lambda(forward, net=nn.Linear(4, 3))


def failing():
    def forward(self, x):
        raise RuntimeError("no such thing")

    return Lambda(forward, net=nn.Linear(4, 3))


REFUSED = {
    ReadsAGlobal: "of the model itself, .* a global variable",
    WritesAGlobal: "changed `calls` of the model itself; this was undone",
    cached: "`cache`, a tensor that was computed from parameters before",
    looked_up_by_identity: "a copy of it raises KeyError",
    looked_up_with_a_default: "a copy of the model is not the model: its outputs differ by up to",
    reading_a_generator: "Python generator, which cannot be copied",
    drawing_from_its_own_stream: "change from one forward to the next",
    noisy_and_probabilities_in_evaluation: r"float\d+ \[2, 3\] of probabilities in eval mode",
    noisy_and_detached_in_evaluation: "do not depend on 'a.bias', 'a.weight'",
    of_another_shape_in_training: r"\[2, 3\] in eval mode and float\d+ \[2, 2\]",
    failing: "the model raises RuntimeError: no such thing",
}


@pytest.mark.parametrize("make", REFUSED)
def test_a_refusal_names_what_differs_and_leaves_no_trace(make):
    torch.manual_seed(0)
    model = make().train()
    tensors = {n: (t, t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}
    attributes = {m: dict(vars(m)) for m in model.modules()}
    lengths = {n: len(v) for n, v in vars(model).items() if isinstance(v, list)}
    with pytest.raises(FimprobeError, match=REFUSED[make]):
        measure(model, torch.randn(6, 4), likelihood="categorical")
    assert all(m.training for m in model.modules())
    for name, (tensor, value) in tensors.items():
        assert model.state_dict(keep_vars=True)[name] is tensor and torch.equal(tensor, value)
    assert all(vars(m) == attributes[m] for m in model.modules())
    assert lengths == {n: len(v) for n, v in vars(model).items() if isinstance(v, list)}
    if make is reading_a_generator:
        assert next(model.values) == 1.0


def test_training_mode_is_measured_where_eval_mode_is_another_function():
    def forward(self, x):
        h = self.net(x)
        return h if self.training else h.softmax(-1)

    report = measure(
        Lambda(forward, net=nn.Linear(4, 3)), torch.randn(6, 4), likelihood="categorical"
    )
    assert any("was measured in training mode" in note for note in report.notes)


def test_dropout_batch_norm_and_noise_are_no_other_function():
    def forward(self, x):
        x = F.dropout(self.norm(self.a(x)), 0.5, self.training)
        if self.training:
            x = x * torch.rand_like(x) + np.random.rand() + random.random()
        return self.b(x)

    model = Lambda(forward, a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 3)).train()
    assert measure(model, torch.randn(6, 4), likelihood="categorical").notes == []


def test_the_model_is_compared_once_and_again_when_it_changed(monkeypatch):
    compared = []
    find = checked_twin.TwinChecks.find_settings
    monkeypatch.setattr(
        checked_twin.TwinChecks, "find_settings", lambda self: compared.append(1) or find(self)
    )
    model, x, plan = (
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3)),
        torch.randn(6, 4),
        Plan(),
    )

    def num_comparisons():
        measure(model, x, likelihood="categorical", plan=plan)
        return len(compared)

    assert num_comparisons() == num_comparisons() == 1
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert num_comparisons() == 1
    changes = [
        lambda: model[0].register_forward_hook(lambda m, a, out: out * 2),
        lambda: model[1].eval(),
        lambda: model[0].bias.requires_grad_(False),
        lambda: setattr(model[2], "forward", model[2].forward),
    ]
    for i, change in enumerate(changes):
        change()
        assert num_comparisons() == num_comparisons() == i + 2


def test_a_hook_that_is_added_later_is_measured():
    model, x, plan = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4), Plan()
    options = {"likelihood": "categorical", "draws": "exact", "bounds": False}
    measure(model, x, plan=plan, **options)
    model[0].register_forward_hook(lambda m, a, out: out * 3)
    later = measure(model, x, plan=Plan(twin=plan.twin), **options).total.i1.trace
    assert later == pytest.approx(measure(model, x, **options).total.i1.trace, rel=1e-5)


def test_fingerprints():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert compute_fingerprint(model) == compute_fingerprint(model)
    assert compute_fingerprint(model) != compute_fingerprint(copy.deepcopy(model).double())


def test_large_frozen_parameters_are_shared_until_they_are_written(monkeypatch):
    monkeypatch.setattr("fimprobe.model.twin.LARGE_FROZEN_BYTES", 0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    plain[0].requires_grad_(False)
    x = Batch.of(torch.randn(6, 4))
    twin, settings = make_checked_twin(plain, x, select_outputs, None)
    assert twin[0].weight.data_ptr() == plain[0].weight.data_ptr() and settings.shares_frozen
    assert twin[1].weight.data_ptr() != plain[1].weight.data_ptr()

    def forward(self, x):
        self.a.weight.data.clamp_(-1, 1)
        return self.b(self.a(x))

    writing = Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    writing.a.requires_grad_(False)
    twin, settings = make_checked_twin(writing, x, select_outputs, None)
    assert twin.a.weight.data_ptr() != writing.a.weight.data_ptr() and not settings.shares_frozen


def test_modules_can_be_converted_inside_of_a_forward():
    code = """
    import torch, fimprobe
    from torch import nn
    class Converts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)
        def forward(self, x):
            self.inner.half().to(x.dtype)
            return self.inner(x) * self.scale
    model = nn.Sequential(Converts(), nn.Tanh(), nn.Linear(3, 3))
    report = fimprobe.measure(model, torch.randn(4, 4), likelihood="categorical", second_order="off")
    print(sorted(set(report.coverage.values())))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "loop over samples" in done.stdout, done.stderr


def test_functions_that_refer_to_themselves_are_copied_once():
    def outer():
        calls = []

        def recurse(n):
            calls.append(n)
            return n if n == 0 else recurse(n - 1)

        return recurse, calls

    recurse, calls = outer()
    copied = ObjectCopier({}).copy({"a": recurse, "b": [recurse]})
    assert copied["a"] is copied["b"][0] is not recurse
    assert copied["a"](2) == 0 and calls == []
    assert copied["a"].__closure__[1].cell_contents is copied["a"]


def test_bound_methods_of_containers_follow_their_container():
    values = []
    append, kept = ObjectCopier({}).copy((values.append, values))
    append(1)
    assert kept == [1] and values == []


def test_plain_data_is_recognised():
    assert is_plain_data([(1, "a", torch.zeros(2))] * 3)
    assert not is_plain_data([[1]]) and not is_plain_data([torch.zeros(2, requires_grad=True)])


def test_random_streams_are_restored_and_a_draw_is_seen():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for draw in (lambda: torch.rand(()), random.random, np.random.rand):
        values = []
        for _ in range(2):
            with same_randomness(host=True) as randomness:
                values.append(float(draw()))
            assert randomness.moved
        assert values[0] == values[1]
    with same_randomness() as randomness:
        torch.zeros(3)
    assert not randomness.moved
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_attributes_of_torchs_classes_only_are_switched_off():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.sparse, self.scale_grad_by_freq, self.max_norm = True, True, 1.0

    twin = make_twin(nn.ModuleList([Gate(), nn.Embedding(3, 2, sparse=True), nn.ReLU(inplace=True)]))
    assert twin[0].sparse is True and twin[0].scale_grad_by_freq is True
    assert twin[1].sparse is False and twin[2].inplace is False


class RandomSpans(nn.Module):
    """Replaces random rows by a trained vector in training mode, as speech models do."""

    def __init__(self):
        super().__init__()
        self.vector, self.a, self.b = nn.Parameter(torch.ones(3)), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.training:
            x = torch.where(torch.rand(len(x), 1) < 0.5, self.vector, x)
        return self.b(self.a(x).tanh())


class RandomElsewhere(RandomSpans):
    """Computes with other weights altogether in eval mode."""

    def forward(self, x):
        return super().forward(x) if self.training else x[:, :2] * self.vector[:2]


def test_a_vector_that_only_training_draws_is_left_out_and_named():
    report = measure(RandomSpans(), torch.randn(5, 3), likelihood="categorical")
    assert "left out" in report.coverage["vector"] and "vector" not in report.parameters
    assert sum("do not depend on 'vector'" in note for note in report.notes) == 1
    with pytest.raises(FimprobeError, match="computes something else in eval mode"):
        measure(RandomElsewhere(), torch.randn(5, 3), likelihood="categorical")


def test_small_logits_in_evaluation_are_not_taken_for_probabilities():
    torch.manual_seed(0)

    def forward(self, x):
        return F.dropout(0.01 * self.net(x), 0.5, self.training) - (0.01 if self.training else 0)

    model = Lambda(forward, net=nn.Linear(4, 3)).train()
    with torch.no_grad():
        model.net.weight.abs_()
        model.net.bias.abs_()
    x = torch.rand(6, 4)
    outputs = model.eval()(x)
    assert float(outputs.min()) >= 0
    assert float(outputs.max()) <= 1
    assert measure(model.train(), x, likelihood="categorical").total.i1.trace > 0
