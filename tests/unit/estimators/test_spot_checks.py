"""V2 and its error from values of spot checks that are made up."""

import pytest
import torch

from fimprobe.estimators.spot_checks import PILOT_WEIGHT, estimate_v2
from fimprobe.statistics import SpotChecks, SpotStratum


def stratum(values, *, pilot=2, owners=None, kind="Linear", rounding=0.0, layer="a"):
    values = torch.as_tensor(values, dtype=torch.float64)
    owners = torch.zeros(len(values), dtype=torch.long) if owners is None else torch.tensor(owners)
    return SpotStratum(
        layer=layer,
        kind=kind,
        parameters=[f"{layer}.weight", f"{layer}.bias"],
        owners=owners,
        values=values,
        rounding=torch.full_like(values, rounding),
        pilot=pilot,
    )


def test_the_pilot_has_a_fixed_weight():
    checks = SpotChecks(strata=[stratum([1.0, 3.0, 5.0, 5.0, 5.0, 5.0])])
    estimate = estimate_v2(checks, ["a.weight", "a.bias"])
    assert estimate.value == pytest.approx(PILOT_WEIGHT * 2 + (1 - PILOT_WEIGHT) * 5)


def test_parameters_add_up_to_their_layer_and_layers_to_the_model():
    first = stratum([1.0, 2.0, 3.0, 4.0] * 3, owners=[0, 1, 0, 1] * 3)
    second = stratum([5.0, 6.0, 7.0], layer="b")
    checks = SpotChecks(strata=[first, second])
    weight, bias = (estimate_v2(checks, [f"a.{n}"]).value for n in ("weight", "bias"))
    layer = estimate_v2(checks, ["a.weight", "a.bias"])
    other = estimate_v2(checks, ["b.weight", "b.bias"])
    total = estimate_v2(checks, [*first.parameters, *second.parameters])
    assert weight + bias == pytest.approx(layer.value)
    assert layer.value + other.value == pytest.approx(total.value)
    assert total.error == pytest.approx((layer.error**2 + other.error**2) ** 0.5)


def test_a_group_without_checks_is_zero():
    estimate = estimate_v2(SpotChecks(strata=[stratum([1.0, 2.0, 3.0])]), ["c.weight"])
    assert (estimate.value, estimate.error) == (0.0, 0.0)


def test_a_parameter_without_checks_is_unknown():
    checks = SpotChecks(strata=[stratum([1.0, 2.0, 3.0], owners=[0, 0, 0])])
    assert estimate_v2(checks, ["a.bias"]).value is None
    assert "no spot check" in estimate_v2(checks, ["a.bias"]).reason


def test_a_parameter_with_few_checks_is_unknown():
    for few, known in ((4, False), (5, True)):
        owners = [1] * few + [0] * 9
        estimate = estimate_v2(
            SpotChecks(strata=[stratum([1.0] * (few + 9), owners=owners)]), ["a.bias"]
        )
        assert (estimate.value is not None) == known
        assert known or "too few spot checks" in estimate.reason


def test_zeros_alone_state_no_error_of_zero():
    checks = SpotChecks(strata=[stratum([0.0] * 20), stratum([1.0, 2.0, 3.0], layer="b")])
    layer = estimate_v2(checks, ["a.weight", "a.bias"])
    assert layer.value is None and "every spot check was zero" in layer.reason
    total = estimate_v2(checks, ["a.weight", "b.weight", "b.bias"])
    assert total.value == pytest.approx(estimate_v2(checks, ["b.weight", "b.bias"]).value)


def test_what_may_be_rounding_is_unknown_or_part_of_the_error():
    unknown = estimate_v2(SpotChecks(strata=[stratum([1.0, 2.0, 3.0], rounding=0.8)]), ["a.weight"])
    assert unknown.value is None and "rounding" in unknown.reason
    exact, rounded = (
        estimate_v2(SpotChecks(strata=[stratum([2.0] * 40, rounding=r)]), ["a.weight"])
        for r in (0.0, 0.4)
    )
    assert rounded.error**2 - exact.error**2 == pytest.approx(0.8**2)


def test_a_failure_is_the_reason():
    estimate = estimate_v2(SpotChecks(strata=[], failure="no difference"), ["a.weight"])
    assert (estimate.value, estimate.reason) == (None, "no difference")


@pytest.mark.parametrize("spread", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("main", [2, 10, 40])
def test_stated_errors_of_skewed_values_cover_their_mean(spread, main):
    covered, count = 0, 300
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        logs = torch.randn(4, 2 + main, generator=generator, dtype=torch.float64) * spread
        strata = [stratum(x.exp(), layer=f"{i}") for i, x in enumerate(logs)]
        estimate = estimate_v2(SpotChecks(strata=strata), ["0.weight", "0.bias"])
        mean = torch.tensor(spread**2 / 2).exp().item()
        covered += abs(estimate.value - mean) <= 2 * estimate.error
    assert covered >= 0.9 * count
