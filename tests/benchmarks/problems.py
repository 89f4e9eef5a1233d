"""The networks that are measured, at their size and tiny, and the unit: a forward and a backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.torchvision_compat import hide_broken_torchvision

hide_broken_torchvision()  # before transformers: BackPACK installs a torchvision


@dataclass(frozen=True)
class Problem:
    """A network in eval mode and a batch of inputs; labels are classes, one or one per token."""

    name: str
    model: nn.Module
    x: Tensor

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


def mlp(sizes: tuple[int, ...] = (784, 512, 512, 10), batch: int = 256) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(zip(sizes, sizes[1:])):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(width_in, width_out)]
    return nn.Sequential(*layers), torch.randn(batch, sizes[0])


def cnn(
    channels: tuple[int, ...] = (3, 32, 64, 64), side: int = 32, batch: int = 64, classes: int = 10
) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for channels_in, channels_out in zip(channels, channels[1:]):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    last = channels[-1] * (side // 2 ** (len(channels) - 1)) ** 2
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, classes))
    return model, torch.randn(batch, channels[0], side, side)


class Logits(nn.Module):
    """A transformers model that returns the logits only.

    ``linear`` writes its Conv1D as nn.Linear, which is the same network (weights transposed), and
    gives every sample its own position ids: most peers know neither Conv1D nor shared lookups.
    """

    def __init__(self, lm: nn.Module, linear: bool = False) -> None:
        super().__init__()
        self.lm, self.linear = lm, linear
        if linear:
            _write_conv1d_as_linear(lm)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.linear:
            return self.lm(tokens).logits
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return self.lm(tokens, position_ids=places).logits


def gpt2(
    tied: bool,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    length: int = 64,
    vocabulary: int = 1000,
    batch: int = 8,
) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=length,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return Logits(GPT2LMHeadModel(config)), torch.randint(vocabulary, (batch, length))


def _write_conv1d_as_linear(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ == "Conv1D":
            linear = nn.Linear(*child.weight.shape)
            linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
            linear.bias = nn.Parameter(child.bias.detach().clone())
            setattr(module, name, linear)
        else:
            _write_conv1d_as_linear(child)


def smooth(model: nn.Module) -> nn.Module:
    """GELU for ReLU: where layers are piecewise linear, second derivatives within them vanish."""
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.GELU())
    return model


FULL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "MLP 784-512-512-10, B=256": mlp,
    "CNN 3 conv, 32×32×3, B=64": cnn,
    "GPT-2 4 layers, d=128, T=64, V=1000, B=8, untied": lambda: gpt2(False),
    "GPT-2, the same, tied": lambda: gpt2(True),
}
"""What is timed."""

_TINY_GPT2 = {"layers": 2, "width": 8, "heads": 2, "length": 6, "vocabulary": 5, "batch": 3}
TINY: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = dict(
    zip(
        FULL,
        (
            lambda: mlp((6, 5, 4, 3), 4),
            lambda: cnn((2, 3, 4, 4), 8, 3, 3),
            lambda: gpt2(False, **_TINY_GPT2),
            lambda: gpt2(True, **_TINY_GPT2),
        ),
    )
)
"""The same architectures, small enough for dense Jacobians: on these correctness is checked."""


def make_problem(name: str, *, tiny: bool = False, gelu: bool = False) -> Problem:
    """The problem of that name, always with the same weights and inputs."""
    torch.manual_seed(0)
    model, x = (TINY if tiny else FULL)[name]()
    model.eval()
    if tiny:  # logits of 0.02 have the same p everywhere and would hide what is wrong with p
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return Problem(name, smooth(model) if gelu else model, x)


def for_peers(problem: Problem) -> Problem:
    """A copy of the problem whose model is made of layers that peers know."""
    model = copy.deepcopy(problem.model)
    model = Logits(model.lm, linear=True).eval() if isinstance(model, Logits) else model
    return Problem(problem.name, model, problem.x)


def sample_labels(h: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=h.detach()).sample()


def loss_of(h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h.flatten(0, -2), y.flatten(), reduction="sum")


def forward_backward(problem: Problem) -> Callable[[], None]:
    """The unit of every ratio, labels drawn from the model."""
    model, x = problem.model, problem.x

    def run() -> None:
        model.zero_grad(set_to_none=True)
        h = model(x)
        loss_of(h, sample_labels(h)).backward()

    return run
