"""Shift, mask and family of a transformers model's head: the model's own loss is the oracle.

Up to its reduction, a model's loss is minus the mean log-likelihood of the labels under ours.
"""

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian
from fimprobe.training.likelihood_inference.transformers_heads import (
    data_labels,
    find_head,
    infer_from_model,
    label_mask,
)
from tests.models.transformers_cases import (
    CLASSES,
    LENGTH,
    SIZE,
    bart,
    decoder,
    distilbert,
    encoder,
    gpt2,
    images,
    lively,
    mamba,
    padded,
    t5,
    tokens,
    vit,
)


def log_likelihoods(likelihood, outputs, labels, mask):
    """log p of every label that counts, by torch's own distributions."""
    if isinstance(likelihood, Categorical):
        mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        table = outputs.movedim(likelihood.class_dim, -1)[mask]
        return torch.distributions.Categorical(logits=table).log_prob(labels[mask])
    assert mask is None
    if isinstance(likelihood, Bernoulli):
        return torch.distributions.Bernoulli(logits=outputs).log_prob(labels)
    return torch.distributions.Normal(outputs, likelihood.sigma).log_prob(labels.to(outputs.dtype))


def mean_loss(likelihood, outputs, labels, mask):
    """What the model's loss must be; squared error is −2 log p less its constant."""
    mean = -log_likelihoods(likelihood, outputs, labels, mask).mean()
    return 2 * mean - math.log(2 * math.pi) if isinstance(likelihood, Gaussian) else mean


def agrees(model, inputs, *wrapped, rtol=1e-6):
    """The model's own loss against ours; ``wrapped``: what the user calls, if not the model.

    The library takes its losses of language models in float32; a wrong shift is off by 1e-2.
    """
    model = lively(model).double()
    called = wrapped[0](model) if wrapped else model
    with torch.no_grad():
        out = called(**inputs)
    decision = infer_from_model(called, (), inputs)
    mask, labels = label_mask(called, (), inputs), data_labels(called, (), inputs)
    decision.likelihood.check_labels(out.logits, labels)
    ours = mean_loss(decision.likelihood, out.logits, labels, mask)
    assert float(out.loss) == pytest.approx(float(ours), rel=rtol, abs=0)
    return decision, mask


def text(left=False, prompt=1):
    """A padded batch whose labels leave out the padding and a prompt."""
    batch = padded(left)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :prompt] = -100
    return {**batch, "labels": labels}


def some(labels):
    """Every second label is left out."""
    labels = labels.clone()
    labels.view(-1)[::2] = -100
    return labels


def targets():
    """Source, and labels of the target with padding −100."""
    labels = tokens(3)
    labels[1, 2:] = -100
    return {**padded(), "labels": labels}


_SMALL = {"num_hidden_layers": 1}
_WHOLE = torch.tensor([0, 2, 1])
_BITS = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
_REAL = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
_MULTI = {"problem_type": "multi_label_classification"}


def pictures(labels):
    return {**{k: v.double() for k, v in images().items()}, "labels": labels}


CAUSAL = {
    "GPT-2": gpt2,
    "Llama": lambda: decoder("Llama", **_SMALL),
    "Mamba": mamba,
    "BERT decoder": lambda: encoder("Bert", "LMHeadModel", is_decoder=True, **_SMALL),
    "BART's decoder": lambda: bart("BartForCausalLM"),
}
OTHERS = {
    "BERT masked": lambda: (
        encoder("Bert", "ForMaskedLM", **_SMALL),
        {**padded(), "labels": some(tokens())},
    ),
    "DistilBERT masked": lambda: (distilbert("ForMaskedLM"), {**padded(), "labels": some(tokens())}),
    "tokens": lambda: (
        encoder("Roberta", "ForTokenClassification", **_SMALL),
        {**padded(), "labels": some(torch.randint(CLASSES, (SIZE, LENGTH)))},
    ),
    "sequences": lambda: (
        encoder("Bert", "ForSequenceClassification", **_SMALL),
        {**padded(), "labels": _WHOLE},
    ),
    "sequences, labels [B, 1]": lambda: (
        distilbert("ForSequenceClassification"),
        {**padded(), "labels": _WHOLE[:, None]},
    ),
    "sequences by a decoder": lambda: (
        decoder("Llama", "ForSequenceClassification", num_labels=CLASSES),
        {**padded(), "labels": _WHOLE},
    ),
    "images": lambda: (vit(), pictures(_WHOLE)),
    "choices": lambda: (
        encoder("Bert", "ForMultipleChoice", **_SMALL),
        {"input_ids": torch.stack([tokens(), tokens()], 1), "labels": torch.tensor([0, 1, 1])},
    ),
    "next sentence": lambda: (
        encoder("Bert", "ForNextSentencePrediction", **_SMALL),
        {**padded(), "labels": torch.tensor([0, 1, 1])},
    ),
    "several labels": lambda: (
        encoder("Bert", "ForSequenceClassification", **_MULTI, **_SMALL),
        {**padded(), "labels": _BITS},
    ),
    "several labels, seen by their type": lambda: (vit(), pictures(_BITS)),
    "regression": lambda: (
        distilbert("ForSequenceClassification", num_labels=1),
        {**padded(), "labels": _REAL},
    ),
    "regression of images": lambda: (vit(num_labels=1), pictures(_REAL)),
    "regression of three": lambda: (
        gpt2("GPT2ForSequenceClassification", problem_type="regression"),
        {**padded(), "labels": _REAL[:, None].expand(-1, CLASSES).contiguous()},
    ),
    "T5": lambda: (t5(), targets()),
    "BART": lambda: (bart(), targets()),
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_language_models(name, left):
    decision, mask = agrees(CAUSAL[name](), text(left))
    assert decision.likelihood == Categorical()
    assert int(mask.sum()) < SIZE * LENGTH


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads(name):
    model, inputs = OTHERS[name]()
    decision, _ = agrees(model, inputs)
    kind = {"several": Bernoulli, "regress": Gaussian}.get(name[:7], Categorical)
    assert isinstance(decision.likelihood, kind)


def test_a_shift_that_is_wrong_is_seen():
    """The oracle itself: with the labels unmoved, or the padding read, the losses differ."""
    model, inputs = lively(gpt2()).double(), text()
    with torch.no_grad():
        out = model(**inputs)
    labels = inputs["labels"]
    for read in (labels != -100, torch.ones_like(labels, dtype=torch.bool)):
        ours = mean_loss(Categorical(), out.logits, labels.clamp(min=0), read)
        assert abs(float(out.loss - ours)) > 1e-2


def test_the_gradient_of_the_loss_in_use_decides_the_shift():
    model, inputs = lively(gpt2()).double(), text()
    labels = inputs["labels"]
    out = model(**{k: v for k, v in inputs.items() if k != "labels"})
    for moves in (False, True):
        logits = out.logits.detach().requires_grad_()
        wanted = torch.cat([labels[:, 1:], labels.new_full((SIZE, 1), -100)], 1) if moves else labels
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        (gradient,) = torch.autograd.grad(loss, logits)
        read = (gradient != 0).any(-1)
        assert torch.equal(label_mask(model, (), inputs, read), wanted != -100)
        assert torch.equal(data_labels(model, (), inputs, read), wanted)
        without = {k: v for k, v in inputs.items() if k != "labels"}
        assert torch.equal(label_mask(model, (), without, read), wanted != -100)


@pytest.mark.parametrize("left", [False, True])
def test_without_labels_the_attention_mask_tells(left):
    """As if the labels were the tokens, with −100 for padding."""
    batch = padded(left)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (gpt2(), encoder("Bert", "ForTokenClassification")):
        told = label_mask(model, (), {**batch, "labels": labels})
        assert torch.equal(label_mask(model, (), batch), told)
        assert torch.equal(
            label_mask(model, (batch["input_ids"],), {**batch, "input_ids": None}), told
        )
        assert label_mask(model, (), {"input_ids": batch["input_ids"]}) is None
        assert data_labels(model, (), batch) is None
    keep = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    pair = {**batch, "decoder_input_ids": tokens(3), "decoder_attention_mask": keep}
    assert torch.equal(label_mask(t5(), (), pair), keep != 0)
    assert label_mask(vit(), (), images()) is None


class Parallel(nn.DataParallel):
    """Calls the module straight through."""

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Mine(transformers.GPT2LMHeadModel):
    """A user's subclass."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def adapted(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    ).double()


def prompted(model):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).double()


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Parallel, adapted, prompted, compiled, copy.deepcopy])
def test_wrapped_models(wrap):
    model, inputs = gpt2(), text(left=False, prompt=0)
    _, mask = agrees(model, inputs, wrap)
    assert mask.shape == (SIZE, LENGTH + 2 * (wrap is prompted))


def test_a_subclass_and_positional_arguments():
    model, inputs = lively(Mine(gpt2().config)).double(), text()
    agrees(model, inputs)
    bert = encoder("Bert", "ForMaskedLM")
    args = (inputs["input_ids"], inputs["attention_mask"], None, None, None)
    assert torch.equal(label_mask(bert, args, {"labels": inputs["labels"]}), inputs["labels"] != -100)
    assert find_head(encoder("Bert", "Model")) is None
    assert infer_from_model(nn.Linear(2, 2)) is None


SEVERAL = {
    "answers": (lambda: encoder("Bert", "ForQuestionAnswering"), "start_logits"),
    "pre-training": (lambda: encoder("Bert", "ForPreTraining"), "one of its losses"),
    "double heads": (lambda: gpt2("GPT2DoubleHeadsModel"), "one of its losses"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_outputs_are_left_to_the_loss(name):
    make, words = SEVERAL[name]
    model = make()
    decision = infer_from_model(model)
    assert decision.likelihood is None and not decision.final and words in decision.remedy
    with pytest.raises(FimprobeError, match=words) as error:
        fimprobe.estimate(model, [])
    assert "likelihood=" in str(error.value) and "output=" in str(error.value)
    with fimprobe.attach(model, tensorboard=False) as probe:
        assert probe.likelihood is None


def test_outputs_of_other_losses_are_refused_with_what_to_pass():
    detector = nn.Linear(2, 2)
    detector.config = SimpleNamespace(model_type="detr")
    detector.__class__ = type("DetrForObjectDetection", (nn.Linear,), {})
    with pytest.raises(FimprobeError, match="matched boxes.*output="):
        fimprobe.attach(detector, tensorboard=False)


def test_answers_have_the_joint_likelihood_of_start_and_end():
    model = lively(encoder("Bert", "ForQuestionAnswering", num_labels=2, **_SMALL)).double()
    batch = padded()
    start, end = torch.tensor([0, 1, 3]), torch.tensor([2, 1, 0])
    options = {"draws": "exact", "estimators": ["i1"], "bounds": False}
    probe = fimprobe.attach(
        model.train(), tensorboard=False, schedule={"every": 1}, on_error="raise", **options
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(**batch, start_positions=start, end_positions=end).loss.backward()
        optimizer.step()
    probe.detach()
    assert list(probe.likelihood.families) == ["start_logits", "end_logits"]
    model.eval()
    want = fimprobe.measure(
        model,
        batch,
        likelihood="categorical",
        output=lambda out: torch.stack([out.start_logits, out.end_logits], 1),
        **options,
    )
    for report in probe.history:
        assert report.total.i1.trace == pytest.approx(want.total.i1.trace, rel=1e-9)
        assert report.total.i1.label_variance == pytest.approx(want.total.i1.label_variance, rel=1e-9)


def test_what_is_told_for_answers_gives_the_models_own_loss():
    model = lively(encoder("Bert", "ForQuestionAnswering", num_labels=2, **_SMALL)).double()
    start, end = torch.tensor([0, 1, 3]), torch.tensor([2, 1, 0])
    with torch.no_grad():
        out = model(**padded(), start_positions=start, end_positions=end)
    stacked = torch.stack([out.start_logits, out.end_logits], 1)
    ours = mean_loss(Categorical(), stacked, torch.stack([start, end], 1), None)
    assert float(out.loss) == pytest.approx(float(ours), rel=1e-10, abs=0)


@pytest.mark.usefixtures("raw_numbers")  # random probes leave Î₂'s label variance in their noise
def test_regression_is_told_once_and_scales_as_told(caplog):
    model = lively(distilbert("ForSequenceClassification", num_labels=1)).double()
    probe = fimprobe.attach(
        model.train(), tensorboard=False, schedule={"every": 1}, draws="exact", on_error="raise"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with caplog.at_level(logging.WARNING, "fimprobe"):
        for _ in range(2):
            model(**padded(), labels=_REAL).loss.backward()
            optimizer.step()
    probe.detach()
    assert probe.likelihood == Gaussian() and probe.last is not None
    parts = [padded() for _ in range(8)]  # as many inputs as an error takes
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    one, two = (
        fimprobe.measure(model, batch, likelihood=Gaussian(sigma=s), draws="exact") for s in (1, 2)
    )
    assert two.total.i1.trace == pytest.approx(one.total.i1.trace / 4, rel=1e-6)
    assert two.total.i1.rel_error == pytest.approx(one.total.i1.rel_error, rel=1e-6, abs=0)
    assert two.error_of("i1") == pytest.approx(one.error_of("i1"), rel=1e-6, abs=0)
    noise = [r.total.i2.label_variance**0.5 / r.total.i1.trace for r in (one, two)]
    assert noise[1] == pytest.approx(2 * noise[0], rel=1e-6)


def test_the_regressions_warning(caplog):
    with caplog.at_level(logging.WARNING, "fimprobe"):
        probe = fimprobe.attach(
            distilbert("ForSequenceClassification", num_labels=1), tensorboard=False
        )
        probe.detach()
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "sigma=1" in told[0] and "Gaussian(sigma=...)" in told[0]


def test_in_the_loop_padding_is_left_out():
    """The report of a training loop equals a measurement with the mask that the loss reads."""
    model, inputs = lively(gpt2()).double(), text()
    labels = inputs["labels"]
    probe = fimprobe.attach(
        model.train(),
        tensorboard=False,
        schedule={"every": 1},
        draws="exact",
        bounds=False,
        estimators=["i1", "empirical"],
        on_error="raise",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(**inputs).loss.backward()
    optimizer.step()
    probe.detach()
    moved = torch.cat([labels[:, 1:], labels.new_full((SIZE, 1), -100)], 1)
    want = fimprobe.measure(
        model,
        inputs,
        likelihood="categorical",
        draws="exact",
        bounds=False,
        estimators=("i1", "empirical"),
        labels=moved,
        mask=moved != -100,
    )
    for kind in ("i1", "empirical"):
        have, wanted = getattr(probe.last.total, kind), getattr(want.total, kind)
        assert have.trace == pytest.approx(wanted.trace, rel=1e-10, abs=0)


def test_measure_takes_family_and_mask_from_the_head():
    model, inputs = lively(gpt2()), padded()
    options = {"draws": "exact", "bounds": False, "estimators": ("i1",)}
    auto = fimprobe.measure(model, inputs, likelihood="auto", **options)
    mask = label_mask(model, (), inputs)
    wanted = fimprobe.measure(model, inputs, likelihood="categorical", mask=mask, **options)
    assert not mask.all() and auto.total.i1.trace == wanted.total.i1.trace
    assert auto.notes == ["likelihood='auto': GPT2LMHeadModel predicts a class at each position."]
    with pytest.raises(fimprobe.FimprobeError, match="`likelihood` must be named for a ViTFor"):
        fimprobe.measure(lively(vit()), images(), likelihood="auto", **options)
    labels = {**images(), "labels": _WHOLE}
    assert fimprobe.measure(lively(vit()), labels, likelihood="auto", **options).notes


def test_inputs_given_by_hand_are_masked_and_asked_for_their_labels(caplog):
    model, inputs = lively(gpt2()), text()
    options = {"tensorboard": False, "draws": "exact", "bounds": False, "estimators": ["i1"]}
    with fimprobe.attach(model, **options) as probe:
        report = probe.step(inputs)
    carry = label_mask(model, (), inputs)
    want = fimprobe.measure(
        model,
        inputs,
        likelihood="categorical",
        draws="exact",
        bounds=False,
        estimators=("i1",),
        mask=carry,
    )
    assert report.total.i1.trace == pytest.approx(want.total.i1.trace, rel=1e-6)
    classifier = lively(vit())  # a probe keeps no model alive
    with fimprobe.attach(classifier, **options) as probe:
        with caplog.at_level(logging.WARNING, "fimprobe"):
            assert probe.step(images()) is None
        assert "likelihood='auto' needs a training batch or its labels" in caplog.text
        report = probe.step({**images(), "labels": _WHOLE})
    assert report.likelihood == "categorical"
