"""Every sixth family (every third with ``-m long``) of the benchmark that transformers ships: per-sample gradients, and training."""

import pytest
import torch
from breadth import compare, trains_alike
from breadth_models import TEXT

SLOW = ("Switch", "Whisper", "Longformer")  # loops over samples, or long inputs
FAMILIES = [f for f in TEXT if not any(name in f.name for name in SLOW)][1::3]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.long] * (n % 2), id=f.name.removeprefix("transformers "))
        for n, f in enumerate(FAMILIES)
    ],
)
def test_a_model_nobody_here_wrote(family):
    model, inputs = family.build()
    state = {n: x.clone() for n, x in model.state_dict().items()}
    result = compare(model, inputs, family, estimators=("i1",))
    assert not result["missing"]
    assert result["worst"] <= family.rounding
    model.float().load_state_dict(state)
    torch.manual_seed(0)
    assert trains_alike(model, inputs, family)
