"""What a transformers model tells of its labels: their family, where they are, which are left out.

The class says what is predicted: every head is a class ``...For<Task>`` or ``...LMHeadModel``, and a
subclass, a PEFT adapter or a compiled or parallel wrapper still has it among its bases or inside.
transformers' own mapping of classes to losses (``loss_type``) is made from the name as well, but of
the last class only, and falls back on the language model's loss where it does not know it; it and
``config.problem_type`` settle what the name leaves open. Whether position t carries the label of
token t or of token t + 1 is in no attribute: most decoders call the library's loss, which shifts,
BART's and its kin's call cross-entropy, which does not. So it is read off the code of ``forward``,
and where the gradient of the loss in use was seen, that decides.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import IGNORED, Categorical
from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.model.twin import unwrap
from fimprobe.training.loss_inference import Decision

_TASKS = {
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
    "ForCausalLM": "text",
    "LMHeadModel": "text",
    "ModelWithLMHead": "text",
    "ForConditionalGeneration": "text",
    "EncoderDecoderModel": "text",
    "ForSequenceClassification": "classes",
    "ForImageClassification": "classes",
    "ForVideoClassification": "classes",
    "ForAudioClassification": "classes",
    "ForMultipleChoice": "choice",
    "ForNextSentencePrediction": "choice",
}
_STACK = (
    "likelihood='categorical' and output=lambda out: torch.stack([out.start_logits, "
    "out.end_logits], 1), which has two labels, start and end"
)
_MAP = (
    "likelihood=fimprobe.likelihoods.Categorical(class_dim=1), output= a function from what the "
    "model returns to logits [B, C, H, W] of the labels' size, and mask= a function from the "
    "forward's (args, kwargs) to the pixels that have a label"
)
_ONE = (
    "likelihood=, output= a function from what the model returns to the logits of one of its losses, "
    "and mask= a function from the forward's (args, kwargs) to the labels that this loss reads"
)
_SEVERAL = {
    "ForQuestionAnswering": ("start and end logits", _STACK),
    "ForPreTraining": ("several outputs with a loss each", _ONE),
    "DoubleHeadsModel": ("several outputs with a loss each", _ONE),
    "ForSemanticSegmentation": ("a map of logits smaller than its labels", _MAP),
    "ForInstanceSegmentation": ("matched masks and classes", _ONE),
    "ForUniversalSegmentation": ("matched masks and classes", _ONE),
    "ForObjectDetection": ("matched boxes and classes", _ONE),
    "ForCTC": ("a loss over alignments, under which positions are not independent", _ONE),
}
_NO_SIGMA = (
    "the noise level of a regression is not in the model, so sigma=1 is taken. Î₁'s relative errors "
    "do not depend on it; traces go with 1/sigma², Î₂'s relative errors from labels with sigma. Pass "
    "likelihood=fimprobe.likelihoods.Gaussian(sigma=...) with the residuals' standard deviation"
)


class Head(NamedTuple):
    """A model's head: the class that names it, what it predicts, and whether t predicts t + 1."""

    name: str
    task: str
    shift: bool = False


def find_head(model: nn.Module) -> Head | None:
    """The head of a transformers model, wrapped or not; None for other models and bare bodies."""
    model = _unwrap_adapters(model)
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    for kind in type(model).__mro__:
        for ending, task in {**_TASKS, **dict.fromkeys(_SEVERAL, "several")}.items():
            if kind.__name__.endswith(ending):
                return Head(kind.__name__, task, task == "text" and _shifts_labels(model))
    return None


def infer_from_model(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Decision | None:
    """The likelihood that a transformers model trains, as ``Decision``; None where nothing tells.

    A classifier without ``problem_type`` trains on classes or on yes and no for each label, as its
    labels are whole or not: with a batch's ``args`` and ``kwargs`` these are asked.
    """
    head = find_head(model)
    if head is None:
        return None
    config: Any = _unwrap_adapters(model).config
    if head.task == "several":
        what, remedy = next(v for k, v in _SEVERAL.items() if head.name.endswith(k))
        return Decision(None, f"{head.name} has {what}", remedy=f"Pass {remedy}")
    if head.task == "choice":
        return Decision(Categorical(), f"{head.name} predicts one of several choices")
    if head.task != "classes":
        return Decision(Categorical(), f"{head.name} predicts a class at each position")
    problem = getattr(config, "problem_type", None)
    if problem is None and config.num_labels == 1:
        problem = "regression"
    if problem is None:
        labels = arguments(model, args, kwargs or {}).get("labels")
        if not isinstance(labels, Tensor):
            return None
        whole = not labels.is_floating_point()
        problem = "single_label_classification" if whole else "multi_label_classification"
    if problem == "multi_label_classification":
        return Decision(Bernoulli(), f"{head.name} with problem_type={problem!r}")
    if problem == "regression":
        return Decision(Gaussian(), f"{head.name} does regression: {_NO_SIGMA}", told=True)
    return Decision(Categorical(), f"{head.name} predicts one of {config.num_labels} classes")


def mask_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], read: Tensor | None = None
) -> Tensor | None:
    """Positions that carry a label [B, T]; None where every output does, or nothing is known.

    With labels in the batch, those that the model's loss reads: not −100. Without, ``read`` (where
    the gradient of the loss in use arrived), or else the tokens of the attention mask.
    """
    head = find_head(model)
    if head is None or head.task not in ("text", "tokens"):
        return read
    given = arguments(model, args, kwargs)
    labels = given.get("labels")
    if isinstance(labels, Tensor):
        carry = _prefixed(model, labels, IGNORED) != IGNORED
        return _shift_left(carry, False) if _labels_are_shifted(head, carry, read) else carry
    if read is not None:
        return read
    pair = getattr(_unwrap_adapters(model).config, "is_encoder_decoder", False)
    tokens = given.get("decoder_attention_mask" if pair else "attention_mask")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return None
    carry = _prefixed(model, tokens, 0) != 0
    # an encoder-decoder is given its targets shifted already
    return carry if pair or not head.shift else _shift_left(carry, False)


def labels_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], read: Tensor | None = None
) -> Tensor | None:
    """The batch's labels as our likelihoods take them; None where the batch has none."""
    labels = arguments(model, args, kwargs).get("labels")
    head = find_head(model)
    if not isinstance(labels, Tensor) or head is None:
        return labels if isinstance(labels, Tensor) else None
    if head.task in ("text", "tokens"):
        labels = _prefixed(model, labels, IGNORED)
        moves = _labels_are_shifted(head, labels != IGNORED, read)
        return _shift_left(labels, IGNORED) if moves else labels
    decision = infer_from_model(model, args, kwargs)
    if decision is not None and isinstance(decision.likelihood, Gaussian):
        return labels.reshape(len(labels), -1)
    if decision is not None and isinstance(decision.likelihood, Categorical):
        return labels.reshape(-1)
    return labels


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of ``forward``."""
    if not args:
        return kwargs
    try:
        bound = inspect.signature(unwrap(model).forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def _unwrap_adapters(model: nn.Module) -> Any:
    """The transformers model inside of wrappers and PEFT's adapters."""
    model = unwrap(model)
    inner = getattr(model, "get_base_model", None)
    return inner() if hasattr(model, "peft_config") and callable(inner) else model


def _prefixed(model: nn.Module, x: Tensor, fill: int) -> Tensor:
    """``x`` [B, T] behind the tokens that PEFT's prompt learning puts before the text."""
    config: Any = getattr(unwrap(model), "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return x
    if "PREFIX" in str(config.peft_type):  # these are keys and values only
        return x
    return F.pad(x, (config.num_virtual_tokens, 0), value=fill)


def _shift_left(x: Tensor, fill: int | bool) -> Tensor:
    """Position t takes over what belongs to token t + 1; the last has nothing."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], fill)], 1)


def _labels_are_shifted(head: Head, carry: Tensor, read: Tensor | None) -> bool:
    """Whether labels move: as the loss's gradient says where it was seen, as the class does else."""
    if head.task != "text" or read is None or read.shape != carry.shape:
        return head.shift
    wrong = [int((x != read).sum()) for x in (carry, _shift_left(carry, False))]
    return wrong[1] < wrong[0] if wrong[0] != wrong[1] else head.shift


def _shifts_labels(model: Any) -> bool:
    """Whether the class's own loss compares position t with the label of token t + 1.

    The library's loss for language models does, unless ``loss_type`` names another; one written out
    in ``forward`` does where it names what it shifts.
    """
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            found = _loss_style(vars(kind)["forward"])
            if found == "library":
                return getattr(model, "loss_type", None) not in (
                    "ForMaskedLM",
                    "ForTokenClassification",
                )
            if found:
                return found == "shifted"
    return not getattr(model.config, "is_encoder_decoder", False)


@functools.cache
def _loss_style(forward: Any) -> str:
    """How a ``forward`` has its loss: "library", "shifted" or "plain"; "" where it has none."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return ""
    names = {*code.co_names, *code.co_varnames}
    if "loss_function" in names:
        return "library"
    if not names & {"CrossEntropyLoss", "cross_entropy", "loss_fct"}:
        return ""
    return "shifted" if any(re.match("shift", n) for n in code.co_varnames) else "plain"
