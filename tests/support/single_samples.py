"""Measurements compared with single samples that run alone, in float64, labels enumerated."""

import torch

import fimprobe
from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.likelihoods import Gaussian
from fimprobe.measurement.isolation import isolated_state
from tests.oracles import brute_force
from tests.support.curvature import problem_of, seeds_of

EXACT = {"likelihood": "categorical", "draws": "exact", "diagonals": True, "bounds": False}
FIRST_ORDER = {**EXACT, "estimators": ["i1"], "second_order": "off"}


def assert_first_order(model, args, *, reference=None, positions=1, tolerance=1e-10):
    """diag F and its label variance are those of single samples.

    ``reference``: a module with the same parameters that the oracle can differentiate, in the mode
    that counts; by default the model in eval mode. Returns the report.
    """
    report = fimprobe.measure(model, args, **FIRST_ORDER)
    reference = model.eval() if reference is None else reference
    classes = reference(*(a[:1] for a in args)).shape[-1]
    oracle = brute_force.enumerate_fisher(
        reference, args, lambda h: brute_force.categorical_labels(h, positions, classes)
    )
    for name, group in report.parameters.items():
        want = brute_force.summarise(*oracle, name)
        _close(group.i1.diagonal[name], want["diagonal"], tolerance)
        _close(group.i1.diagonal_label_variance[name], want["label"], tolerance)
    left_out = {n for n, p in reference.named_parameters() if p.requires_grad} - set(
        report.parameters
    )
    for name in left_out:
        assert float(brute_force.summarise(*oracle, name)["diagonal"].max()) == 0, name
    return report


def assert_second_order(model, args, *, reference=None, tolerance=1e-9):
    """R u of every sample, along one direction u, is that of the reference's plain double backward."""
    problem = problem_of(model, args, likelihood=Gaussian(), draws=1)
    with isolated_state(model, 0):
        measured = measure_with_fallbacks(problem, make_verified_plan(problem))
        seeds = seeds_of(problem)
    assert measured.notes == []
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    bent = brute_force.bent(reference or model.eval(), args, seeds, u)[:, 0]
    assert float(bent.square().sum()) > 1e-6
    largest = float(bent.square().sum(1).max())
    for name, span in brute_force.spans(problem.twin).items():
        want = bent[:, span].square().sum(1)
        if name in measured.curvature.parameters:
            have = measured.curvature.parameters[name].whole[0, :, 0]
            assert float((have - want).abs().max()) <= tolerance * largest, name
        else:
            assert float(want.max()) <= 1e-20 * largest, name


def _close(have, want, tolerance):
    want = want.view_as(have)
    assert float((have - want).abs().max()) <= tolerance * float(want.abs().max().clamp(min=1e-12))
