"""What ``loss=criterion`` takes from a loss of torch, what it leaves out and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimprobe import FimprobeError
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.criteria import read_criterion


def decide(criterion, outputs, labels, *, loss=None):
    """The decision of one batch of a loop that minimises ``loss``, by default the criterion."""
    h = outputs.detach().clone().requires_grad_()
    head = CapturedOutput(h.detach())
    head.store_gradient(torch.autograd.grad((loss or criterion)(h, labels), h)[0])
    return read_criterion(criterion).decide({"": head})


CLASSES = torch.tensor([0, 1, 2, 1, 0, 2])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
CASES = [
    (nn.CrossEntropyLoss(), "categorical", ""),
    (nn.CrossEntropyLoss(reduction="sum"), "categorical", ""),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), "categorical", "weight is left out"),
    (nn.CrossEntropyLoss(label_smoothing=0.1), "categorical", "label_smoothing=0.1 is left out"),
    (nn.CrossEntropyLoss(ignore_index=2), "categorical", "ignore_index=2 is left out"),
    (nn.BCEWithLogitsLoss(), "bernoulli", ""),
    (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "bernoulli", "pos_weight is left out"),
    (nn.MSELoss(), "gaussian", "sigma=1 is used"),
    (nn.MSELoss(reduction="sum"), "gaussian", "sigma=1 is used"),
    (nn.PoissonNLLLoss(), "poisson", ""),
    (nn.PoissonNLLLoss(full=True), "poisson", ""),
]


@pytest.mark.parametrize(("criterion", "family", "left_out"), CASES, ids=lambda x: str(x)[:40])
def test_families_and_what_is_left_out(criterion, family, left_out):
    labels = CLASSES if family == "categorical" else F.one_hot(CLASSES, 3).float()
    decision = decide(criterion, LOGITS, labels)
    assert decision.likelihood.name == family, decision.reason
    assert decision.reason.startswith(f"loss={type(criterion).__name__}: ")
    assert left_out in decision.reason and decision.warn == bool(left_out)


@pytest.mark.parametrize(
    ("shape", "classes_at", "wanted"), [((6, 5, 3), -1, -1), ((6, 3, 5), 1, 1), ((6, 4, 5, 3), -1, 3)]
)
def test_the_gradient_shows_the_dimension_of_the_classes(shape, classes_at, wanted):
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(shape, generator=generator)
    y = torch.randint(3, h.movedim(classes_at, -1).shape[:-1], generator=generator)
    criterion = nn.CrossEntropyLoss()

    def loss(h, y):
        return criterion(h.movedim(classes_at, -1).flatten(0, -2), y.flatten())

    assert decide(criterion, h, y, loss=loss).likelihood.class_dim == wanted


REFUSED = [
    (nn.BCELoss(), "likelihood='bernoulli' and output=torch.logit"),
    (nn.NLLLoss(), "valid logits"),
    (nn.PoissonNLLLoss(log_input=False), "output=torch.log"),
    (nn.L1Loss(), "got L1Loss. Pass an object of one of these classes"),
    (nn.MSELoss, "got MSELoss. Pass an object"),
    (F.cross_entropy, "got cross_entropy. Pass an object"),
    ("mse", "got str."),
    (type("Focal", (nn.CrossEntropyLoss,), {})(), "got Focal."),
]


@pytest.mark.parametrize(("loss", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_has_no_family_is_refused(loss, message):
    with pytest.raises(FimprobeError, match="^`loss` must be ") as error:
        read_criterion(loss)
    assert message in str(error.value)


def test_a_loop_that_minimises_another_loss_is_noticed():
    binary = F.one_hot(CLASSES, 3).float()
    decision = decide(nn.CrossEntropyLoss(), LOGITS, binary, loss=F.binary_cross_entropy_with_logits)
    assert decision.likelihood is None and decision.final and "differs" in decision.reason
    decision = decide(nn.CrossEntropyLoss(), LOGITS, binary, loss=F.mse_loss)
    assert decision.likelihood is None and "does not sum to zero" in decision.reason


def test_several_read_outputs_and_none():
    criterion, heads = read_criterion(nn.MSELoss()), {}
    for name in ("a", "b"):
        heads[name] = CapturedOutput(LOGITS)
    decision = criterion.decide(heads)
    assert decision.likelihood is None and not decision.final  # no gradient yet
    heads["b"].store_gradient(LOGITS + 1)
    assert criterion.decide(heads).path == "b"
    heads["a"].store_gradient(LOGITS - 1)
    assert "several outputs of the model, 'a', 'b'" in criterion.decide(heads).reason


def pair_of(loss, *, rows=6):
    """What the gradients of a loss at two outputs show."""
    generator = torch.Generator().manual_seed(3)
    first, y = torch.randn(2, rows, 1, generator=generator)
    values = {"a": first.clone(), "b": torch.rand(rows, 1, generator=generator) + 0.1}
    values = {path: x.requires_grad_() for path, x in values.items()}
    gradients = torch.autograd.grad(loss(*values.values(), y), list(values.values()))
    heads = {}
    for (path, x), gradient in zip(values.items(), gradients, strict=True):
        heads[path] = CapturedOutput(x.detach())
        heads[path].store_gradient(gradient)
    return read_criterion(nn.GaussianNLLLoss(eps=0.2)).decide(heads)


def test_the_gradients_show_a_mean_and_its_variance():
    criterion = nn.GaussianNLLLoss(eps=0.2, reduction="sum")
    decision = pair_of(lambda m, v, y: criterion(m, y, v))
    assert decision.parts == ("a", "b") and decision.likelihood.eps == 0.2 and not decision.warn
    decision = pair_of(lambda m, v, y: 1e-3 * criterion(m, y, v), rows=2)
    assert not decision.final and "too few" in decision.reason
    for other in (
        lambda m, v, y: criterion(m, y, v.exp()),
        lambda m, v, y: (F.gaussian_nll_loss(m, y, v, reduction="none") * v.detach()).sum(),
    ):
        decision = pair_of(other)
        assert (
            decision.likelihood is None
            and decision.final
            and "weights of the loss" in decision.reason
        )
