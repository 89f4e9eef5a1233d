"""Two engines on one problem, and what agreement means."""

import torch

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.problem.problem import Problem
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin


def make_problem(model, inputs, *, likelihood="categorical", draws=None, mask=None, memory_mb=512):
    return Problem(
        twin=make_twin(model),
        batch=Batch.of(inputs),
        likelihood=get_likelihood(likelihood),
        draws=Draws(count=draws, seed=3),
        select_outputs=select_outputs,
        mask=mask,
        memory_mb=memory_mb,
        diagonals=True,
    )


def close(have, want, rtol=1e-9):
    """Equal within ``rtol`` of the largest entry, rounding of exact zeros aside."""
    have, want = torch.as_tensor(have), torch.as_tensor(want)
    assert have.shape == want.shape
    bound = rtol * want.abs().max() + 1e-20
    assert ((have - want).abs() <= bound).all(), (have - want).abs().max() / want.abs().max()


FIELDS = (
    "a2",
    "a2_sum",
    "a2_square",
    "a4_sum",
    "q_sum",
    "r_sum",
    "squared_norms",
    "gram",
    "a4",
    "q",
    "r",
)


def same(have, want, fields=FIELDS):
    """Two MomentsBatch agree in everything."""
    assert set(have.parameters) == set(want.parameters)
    assert (have.batch_size, have.draws) == (want.batch_size, want.draws)
    for weights in ("square_weights", "quartic_weights", "blocks"):
        a, b = getattr(have, weights), getattr(want, weights)
        assert (a is None) == (b is None)
        if a is not None:
            close(a.double(), b.double())
    for name, moments in have.parameters.items():
        for field in fields:
            a, b = getattr(moments, field), getattr(want.parameters[name], field)
            assert (a is None) == (b is None), (name, field)
            if a is not None:
                close(a, b)


def flat(tree, path=""):
    """The leaves of nested mappings and lists by their paths, such as "/layers/0/i1/trace"."""
    if isinstance(tree, dict):
        return {k: v for key, x in tree.items() for k, v in flat(x, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, x in enumerate(tree) for k, v in flat(x, f"{path}/{i}").items()}
    return {path: tree}


def by_autograd(problem):
    return measure_with_fallbacks(problem, make_verified_plan(problem)).moments["i1"]
