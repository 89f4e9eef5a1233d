"""Kinks are named where they are: by module, else by autograd node; smooth networks have none."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.engines.tracing.smoothness import _MODULES, find_kinks
from tests.models.cases import Lambda

OPTIONS = {
    "AdaptiveMaxPool1d": (2,), "AdaptiveMaxPool2d": (2,), "AdaptiveMaxPool3d": (2,),
    "FractionalMaxPool2d": (2, 3), "FractionalMaxPool3d": (2, 3), "MaxPool1d": (2,),
    "MaxPool2d": (2,), "MaxPool3d": (2,), "Threshold": (0.1, 0.2),
}  # fmt: skip
SMOOTH = {
    "GELU", "GLU", "LogSigmoid", "LogSoftmax", "Mish", "SiLU", "Sigmoid", "Softmax", "Softmax2d",
    "Softmin", "Softplus", "Tanh", "Tanhshrink",
}  # fmt: skip


def kinks_of(model, x):
    return find_kinks(model(x.clone().requires_grad_() * 1), model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", _MODULES)
def test_every_module_with_kinks_is_named(name, training):
    shape = (2, 3, *(8,) * (int(name[-2]) if name.endswith("d") and name[-2].isdigit() else 1))
    model = nn.Sequential(nn.Tanh(), getattr(nn, name)(*OPTIONS.get(name, ())))
    assert kinks_of(model.train(training), torch.randn(shape)) == [f"{name}: 1"]


def test_every_activation_of_torch_is_classified():
    """A new one in torch has to be put on one of the two lists."""
    known = {n for n in nn.modules.activation.__all__ if n != "MultiheadAttention"}
    assert known == (SMOOTH | set(_MODULES)) & known
    for name in SMOOTH:
        kind = getattr(nn, name)
        options = (1,) if "dim" in inspect.signature(kind.__init__).parameters else ()
        assert kinks_of(kind(*options), torch.randn(2, 4, 6, 6)) == [], name


FUNCTIONS = {
    "Relu": F.relu, "Hardtanh": F.relu6, "Elu": F.elu, "Celu": F.celu, "LeakyRelu": F.leaky_relu,
    "Abs": torch.abs, "Max": lambda h: h.max(1)[0], "Amax": lambda h: h.amax(1),
    "Clamp": lambda h: h.clamp(min=0), "ClampMin": lambda h: torch.clamp_min(h, 0),
    "Maximum": lambda h: torch.maximum(h, -h), "Fmax": lambda h: torch.fmax(h, -h),
    "Sort": lambda h: h.sort()[0], "Topk": lambda h: h.topk(2)[0], "Cummax": lambda h: h.cummax(1)[0],
    "Kthvalue": lambda h: h.kthvalue(2)[0], "Median": lambda h: h.median(),
    "MaxPool2DWithIndices": lambda h: F.max_pool1d(h, 2), "Aminmax": lambda h: h.aminmax()[0],
}  # fmt: skip


@pytest.mark.parametrize("node", FUNCTIONS)
def test_functions_are_named_by_their_nodes(node):
    model = Lambda(lambda self, x: FUNCTIONS[node](x))
    assert kinks_of(model, torch.randn(2, 6)) == [f"{node}Backward (called as a function)"]


def test_modules_and_functions_together_and_unused_modules():
    class Mine(nn.ReLU):
        pass

    parts = nn.Conv1d(3, 4, 3), nn.MaxPool1d(2), Mine(), nn.ReLU6(), nn.Hardtanh(), nn.ELU()
    model = Lambda(lambda s, x: s.parts[2](s.parts[1](s.parts[0](x).abs())), *parts)
    assert kinks_of(model, torch.randn(2, 3, 8)) == [
        "MaxPool1d: parts.1",
        "Mine: parts.2",
        "AbsBackward (called as a function)",
    ]
    deep = nn.Sequential(*(nn.ReLU() for _ in range(11)))
    (line,) = kinks_of(deep, torch.randn(2, 3))
    assert line == "ReLU: 0, 1, 2, 3, 4, 5, 6, 7, and 3 more"
    with torch.no_grad():
        assert find_kinks(deep(torch.randn(2, 3)), deep) == []


@pytest.mark.parametrize(("layer", "told"), [(nn.GELU, []), (nn.ReLU, ["ReLU: 1, 3"])])
def test_a_report_tells_kinks_once(layer, told):
    model = nn.Sequential(nn.Linear(4, 5), layer(), nn.Linear(5, 5), layer(), nn.Linear(5, 3))
    report = fimprobe.measure(model, torch.randn(6, 4), likelihood="categorical")
    assert report.kinks == told == report.to_dict()["kinks"]
    lines = [line for line in str(report).splitlines() if "kink" in line]
    assert len(lines) == len(told) and all(k in line for k, line in zip(told, lines, strict=True))
    first = fimprobe.measure(model, torch.randn(6, 4), likelihood="categorical", estimators=("i1",))
    assert not first.kinks and "kink" not in str(first)  # of no concern without Î₂


def test_transformer_with_functional_relu():
    torch.manual_seed(0)
    for activation, told in (("gelu", []), ("relu", ["ReluBackward (called as a function)"])):
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation=activation)
        model = Lambda(lambda s, x: s.parts[1](s.parts[0](x)[:, 0]), layer, nn.Linear(4, 3))
        report = fimprobe.measure(model, torch.randn(4, 3, 4), likelihood="categorical")
        assert report.kinks == told
