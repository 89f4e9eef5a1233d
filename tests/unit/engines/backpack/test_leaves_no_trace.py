"""The engine leaves no trace: on models, on BackPACK's globals, on who does not have BackPACK."""

import warnings

import pytest
import torch
from backpack import backpack, disable, extend, extensions
from backpack.context import CTX
from torch import nn

from fimprobe.engines.backpack import ggn_diagonals, hessian_diagonals, measure_moments
from tests.models.cases import Lambda
from tests.support.agreement import make_problem, same
from tests.support.fresh_process import run_fresh

pytestmark = pytest.mark.filterwarnings("error", "ignore:Using padding", "ignore:.*weight_norm")


def footprint(thing):
    return {k: (id(v), len(v) if isinstance(v, dict) else 0) for k, v in thing.__dict__.items()}


def footprints(model):
    things = [*model.modules(), *model.parameters()]
    return [footprint(x) for x in things]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, double):
    def f(self, x):
        if fails and x.shape[0] >= 9 and torch.is_grad_enabled():
            self.parts[0](x)
            raise RuntimeError("the model's own")
        return self.parts[2](self.parts[1](self.parts[0](x)))

    model = Lambda(f, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model.parts[0].output = "the user's own attribute"
    problem = make_problem(model, torch.randn(9, 4), draws=2)
    twin = problem.twin
    states = [footprints(m) for m in (model, twin)]
    context = (
        CTX.get_active_exts(),
        CTX.get_debug(),
        CTX.get_extension_hook(),
        list(CTX.hook_handles),
    )
    calls = [
        lambda: measure_moments(problem),
        lambda: hessian_diagonals(problem, problem.batch, torch.ones(1, 9, 3)),
        lambda: ggn_diagonals(problem, problem.batch),
    ]
    for call in calls:
        if fails:
            with pytest.raises(RuntimeError, match="the model's own"):
                call()
        else:
            call()
        assert states == [footprints(m) for m in (model, twin)]
        assert context == (
            CTX.get_active_exts(),
            CTX.get_debug(),
            CTX.get_extension_hook(),
            list(CTX.hook_handles),
        )
    assert model.parts[0].output == "the user's own attribute"
    assert all(p.grad is None for m in (model, twin) for p in m.parameters())


def test_a_users_own_backpack_goes_on_working(double):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(3, 4)
    plain = make_problem(model, x, draws=2)
    want = measure_moments(plain)
    extend(model)
    try:
        extension = extensions.BatchGrad()
        with backpack(extension):
            out = model(x).sum()
            with disable():
                have = measure_moments(make_problem(model, x, draws=2))
                assert not disable.should_store_io()
            assert CTX.get_active_exts() == (extension,)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out.backward()
        same(have, want)
        assert model[0].weight.grad_batch.shape == (3, 4, 4)
    finally:
        CTX.remove_hooks()


def test_backpack_is_imported_only_when_asked_for():
    code = (
        "import sys, fimprobe, torch; assert 'backpack' not in sys.modules\n"
        "sys.modules['backpack'] = None  # cannot be imported\n"
        "ask = {'likelihood': 'categorical', 'engine': 'backpack'}\n"
        "try:\n    fimprobe.measure(torch.nn.Linear(2, 2), torch.ones(3, 2), **ask)\n"
        "except fimprobe.FimprobeError as error:\n    print(error)"
    )
    done = run_fresh(code)
    assert "pip install backpack-for-pytorch" in done.stdout, done.stderr
