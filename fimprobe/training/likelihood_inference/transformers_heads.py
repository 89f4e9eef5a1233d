"""Labels of a transformers model: their family, their positions, and the labels of a batch.

The class of the head names the task: ``...For<Task>`` or ``...LMHeadModel``. A subclass has that
class among its bases; a PEFT adapter and a compiled or parallel wrapper hold it inside.
``loss_type`` of transformers comes from the name of the last class only, with the loss of a language
model as its default. It and ``config.problem_type`` decide what the name leaves open.

No attribute states whether position t carries the label of token t or of token t + 1. Most decoders
call the loss of the library, which shifts the labels. BART and similar models call cross-entropy,
which does not. The code of ``forward`` is therefore inspected. If the gradient of the actual loss is
known, it decides instead.
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
from fimprobe.training.likelihood_inference.loss_inference import Decision
from fimprobe.training.likelihood_inference.regression_inference import SIGMA_NOTICE

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
_ONE_OUTPUT = (
    "likelihood=, output= a function from what the model returns to the logits of one of its losses, "
    "and mask= a function from the forward's (args, kwargs) to the labels that this loss reads"
)
_SEVERAL = {
    "ForQuestionAnswering": ("start and end logits", _STACK),
    "ForPreTraining": ("several outputs with a loss each", _ONE_OUTPUT),
    "DoubleHeadsModel": ("several outputs with a loss each", _ONE_OUTPUT),
    "ForSemanticSegmentation": ("a map of logits smaller than its labels", _MAP),
    "ForInstanceSegmentation": ("matched masks and classes", _ONE_OUTPUT),
    "ForUniversalSegmentation": ("matched masks and classes", _ONE_OUTPUT),
    "ForObjectDetection": ("matched boxes and classes", _ONE_OUTPUT),
    "ForCTC": ("a loss over alignments, under which positions are not independent", _ONE_OUTPUT),
}
_READ_OFF_LOSS = ("ForQuestionAnswering", "ForPreTraining", "DoubleHeadsModel")
"""Heads with several outputs whose families the loss gradients show."""


class Head(NamedTuple):
    """The head of a transformers model.

    Attributes:
        name: The class that names the task.
        task: What the head predicts: a value of ``_TASKS``, or "several".
        shift: Whether position t predicts token t + 1.
    """

    name: str
    task: str
    shift: bool = False


def find_head(model: nn.Module) -> Head | None:
    """Return the head of a transformers model, wrapped or not.

    Returns:
        None for other models and for bodies without a head.
    """
    model = _unwrap_adapters(model)
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    for base in type(model).__mro__:
        for ending, task in {**_TASKS, **dict.fromkeys(_SEVERAL, "several")}.items():
            if base.__name__.endswith(ending):
                return Head(base.__name__, task, task == "text" and _shifts_labels(model))
    return None


def infer_from_model(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Decision | None:
    """Infer the likelihood from the class of a transformers model.

    A classifier without ``problem_type`` is trained on classes if its labels are integers, else on
    independent binary labels. That needs the arguments of a batch.

    Args:
        model: The model, wrapped or not.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        The decision; None if class, config and labels do not imply one.
    """
    head = find_head(model)
    if head is None:
        return None
    config: Any = _unwrap_adapters(model).config
    if head.task == "several":
        outputs, remedy = next(v for k, v in _SEVERAL.items() if head.name.endswith(k))
        reason = f"{head.name} has {outputs}"
        final = not head.name.endswith(_READ_OFF_LOSS)
        return Decision(likelihood=None, reason=reason, final=final, remedy=f"Pass {remedy}")
    if head.task == "choice":
        reason = f"{head.name} predicts one of several choices"
        return Decision(likelihood=Categorical(), reason=reason)
    if head.task != "classes":
        reason = f"{head.name} predicts a class at each position"
        return Decision(likelihood=Categorical(), reason=reason)
    problem = getattr(config, "problem_type", None)
    if problem is None and config.num_labels == 1:
        problem = "regression"
    if problem is None:
        labels = arguments(model, args, kwargs or {}).get("labels")
        if not isinstance(labels, Tensor):
            return None
        binary = labels.is_floating_point()
        problem = "multi_label_classification" if binary else "single_label_classification"
    if problem == "multi_label_classification":
        reason = f"{head.name} with problem_type={problem!r}"
        return Decision(likelihood=Bernoulli(), reason=reason)
    if problem == "regression":
        reason = f"{head.name} does regression: {SIGMA_NOTICE}"
        return Decision(likelihood=Gaussian(), reason=reason, warn=True)
    reason = f"{head.name} predicts one of {config.num_labels} classes"
    return Decision(likelihood=Categorical(), reason=reason)


def label_mask(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor | None = None
) -> Tensor | None:
    """Return which positions carry a label.

    Labels of the batch decide first: the loss ignores −100. Otherwise the loss gradient decides, and
    without it the attention mask.

    Args:
        model: The model, wrapped or not.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        positions: Bool [B, T], where the loss gradient is not zero; None if it is not known.

    Returns:
        Bool [B, T]; None if every output carries a label, or if the positions are not known.
    """
    head = find_head(model)
    if head is None or head.task not in ("text", "tokens"):
        return positions
    named = arguments(model, args, kwargs)
    labels = named.get("labels")
    if isinstance(labels, Tensor):
        labelled = _prefixed(model, labels, IGNORED) != IGNORED
        shifted = _labels_are_shifted(head, labelled, positions)
        return _shift_left(labelled, False) if shifted else labelled
    if positions is not None:
        return positions
    encoder_decoder = getattr(_unwrap_adapters(model).config, "is_encoder_decoder", False)
    tokens = named.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return None
    labelled = _prefixed(model, tokens, 0) != 0
    # the targets of an encoder-decoder are shifted already
    return labelled if encoder_decoder or not head.shift else _shift_left(labelled, False)


def data_labels(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor | None = None
) -> Tensor | None:
    """Return the labels of the batch in the form that the likelihood expects.

    Args:
        model: The model, wrapped or not.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        positions: Bool [B, T], where the loss gradient is not zero; None if it is not known.

    Returns:
        Class indices [B, T] or [B], or values [B, C]; None if the batch has no labels.
    """
    labels = arguments(model, args, kwargs).get("labels")
    head = find_head(model)
    if not isinstance(labels, Tensor) or head is None:
        return labels if isinstance(labels, Tensor) else None
    if head.task in ("text", "tokens"):
        labels = _prefixed(model, labels, IGNORED)
        shifted = _labels_are_shifted(head, labels != IGNORED, positions)
        return _shift_left(labels, IGNORED) if shifted else labels
    decision = infer_from_model(model, args, kwargs)
    if decision is not None and isinstance(decision.likelihood, Gaussian):
        return labels.reshape(len(labels), -1)
    if decision is not None and isinstance(decision.likelihood, Categorical):
        return labels.reshape(-1)
    return labels


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names in ``forward``.

    Args:
        model: The model, wrapped or not.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """
    if not args:
        return kwargs
    try:
        bound = inspect.signature(unwrap(model).forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    return {**bound, **kwargs}


def _unwrap_adapters(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers and PEFT adapters."""
    model = unwrap(model)
    inner = getattr(model, "get_base_model", None)
    return inner() if hasattr(model, "peft_config") and callable(inner) else model


def _prefixed(model: nn.Module, x: Tensor, fill: int) -> Tensor:
    """Pad ``x`` [B, T] on the left for the virtual tokens of PEFT's prompt learning."""
    config: Any = getattr(unwrap(model), "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return x
    if "PREFIX" in str(config.peft_type):  # these are keys and values only
        return x
    return F.pad(x, (config.num_virtual_tokens, 0), value=fill)


def _shift_left(x: Tensor, fill: int | bool) -> Tensor:
    """Move each entry of ``x`` [B, T] one position to the left; the last becomes ``fill``."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], fill)], 1)


def _labels_are_shifted(head: Head, labelled: Tensor, positions: Tensor | None) -> bool:
    """Decide whether position t carries the label of token t + 1.

    Args:
        head: The head, whose class decides if the loss gradient does not.
        labelled: Bool [B, T], where there is a label, unshifted.
        positions: Bool [B, T], where the loss gradient is not zero.
    """
    if head.task != "text" or positions is None or positions.shape != labelled.shape:
        return head.shift
    unshifted_errors = int((labelled != positions).sum())
    shifted_errors = int((_shift_left(labelled, False) != positions).sum())
    return head.shift if shifted_errors == unshifted_errors else shifted_errors < unshifted_errors


def _shifts_labels(model: Any) -> bool:
    """Decide whether the loss of the class compares position t with the label of token t + 1.

    The loss of the library for language models does, unless ``loss_type`` names another. A loss
    written out in ``forward`` does if a local variable is named after the shift.
    """
    for base in type(model).__mro__:
        if "forward" in vars(base):
            style = _loss_style(vars(base)["forward"])
            if style == "library":
                return getattr(model, "loss_type", None) not in (
                    "ForMaskedLM",
                    "ForTokenClassification",
                )
            if style:
                return style == "shifted"
    return not getattr(model.config, "is_encoder_decoder", False)


@functools.cache
def _loss_style(forward: Any) -> str:
    """Return how a ``forward`` computes its loss: "library", "shifted", "plain" or, if not, ""."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return ""
    names = {*code.co_names, *code.co_varnames}
    if "loss_function" in names:
        return "library"
    if not names & {"CrossEntropyLoss", "cross_entropy", "loss_fct"}:
        return ""
    return "shifted" if any(re.match("shift", n) for n in code.co_varnames) else "plain"
