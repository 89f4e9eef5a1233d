"""Trainers that ask a language model for log-probabilities of its labels, as TRL's do."""

import types

import pytest
import torch
import torch.nn.functional as F

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.training.likelihood_inference.fused_heads import (
    FUSED_NOTE,
    fused_temperature,
    without_fused_head,
)
from tests.models.transformers_cases import gpt2, lively, tokens
from tests.support.bit_identity import same
from tests.support.warnings import warnings_of

OPTIONS = {
    "schedule": {"every": 1},
    "tensorboard": False,
    "draws": "exact",
    "bounds": False,
    "on_error": "raise",
}


def add_fused_head(model, temperature=1.0):
    """Patch the forward as TRL's ``add_fused_lm_head`` does."""
    original_forward = model.forward

    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original_forward(*args, labels=labels, **kwargs)
        logits = original_forward(*args, **kwargs).logits[:, :-1] / temperature
        mask = labels[:, 1:] != -100
        target = labels[:, 1:].clamp(min=0).unsqueeze(-1)
        log_probs = logits.log_softmax(-1).gather(-1, target).squeeze(-1).masked_fill(~mask, 0)
        return {"loss": -log_probs.sum() / mask.sum(), "log_probs": log_probs, "label_mask": mask}

    model.forward = types.MethodType(forward, model)
    return model


def batch():
    torch.manual_seed(3)
    ids = tokens()[:, :4]
    labels = ids.clone()
    labels[0, :2] = labels[1, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def train(model, *, probed, loss, **options):
    probe = fimprobe.attach(model, **{**OPTIONS, "estimators": ["i1"], **options}) if probed else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = batch()  # it fixes the random numbers of dropout, too
        loss(model(**inputs, fused_lm_head=True)).backward()
        optimizer.step()
    if probe is not None:
        probe.detach()
    return probe


LOSSES = {
    "likelihood": lambda out: out["loss"],
    "preferences": lambda out: -F.logsigmoid(out["log_probs"].sum(1)).mean(),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_inputs_are_measured_at_the_logits(name, temperature, caplog):
    plain = lively(gpt2()).double().train()
    model = add_fused_head(lively(gpt2()).double().train(), temperature)
    model.load_state_dict(plain.state_dict())
    probe = train(model, probed=True, loss=LOSSES[name])
    assert not warnings_of(caplog) and len(probe.history) == 2
    report = probe.history[0]
    assert FUSED_NOTE in report.notes and FUSED_NOTE in probe.last.notes
    labels = batch()["labels"]
    mask = torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], 1)
    want = fimprobe.measure(
        plain,
        {"input_ids": batch()["input_ids"]},
        likelihood="categorical",
        output=lambda out: out.logits / temperature,
        mask=mask,
        draws="exact",
        bounds=False,
        estimators=["i1"],
    )
    assert report.total.i1.trace == pytest.approx(want.total.i1.trace, rel=1e-9)


def test_training_stays_bit_identical():
    models = [add_fused_head(lively(gpt2()).train()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, probed in zip(models, (True, False), strict=True):
        train(model, probed=probed, loss=LOSSES["likelihood"], estimators=["i1", "i2", "empirical"])
    assert same(*(dict(model.state_dict()) for model in models))


def test_the_labels_of_the_data_are_known():
    model = add_fused_head(lively(gpt2()).double().train())
    probe = train(model, probed=True, loss=LOSSES["likelihood"], estimators=["i1", "empirical"])
    assert all(report.total.empirical is not None for report in probe.history)


def test_an_unknown_temperature_is_refused():
    model = gpt2()
    with pytest.raises(FimprobeError, match="temperature.*not known.*output="):
        fused_temperature(model)
    call = {"input_ids": 1, "labels": 2, "fused_lm_head": True, "num_items_in_batch": 3}
    assert without_fused_head(call) == {"input_ids": 1}
