"""Trained models, the inputs they were trained on, and the truth about F over all of these.

The oracle takes central differences of the outputs in float64 and enumerates labels: it shares no
code with fimprobe, and needs no derivative of the model.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

STEP = 2e-4


@dataclass
class Pool:
    """A model, its inputs [N, ...] and data labels; ``family`` of the labels it is trained for."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    family: str

    def train(self, epochs: int, seed: int) -> None:
        """Adam on the family's loss."""
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.inputs), generator=generator).split(32):
                optimizer.zero_grad()
                h, y = self.model(self.inputs[rows]), self.labels[rows]
                if self.family == "categorical":
                    loss = functional.cross_entropy(h.flatten(0, -2), y.flatten())
                else:
                    loss = functional.binary_cross_entropy_with_logits(h, y)
                loss.backward()
                optimizer.step()

    def confidence(self) -> float:
        """The mean probability of the likeliest label."""
        with torch.no_grad():
            h = self.model(self.inputs)
        if self.family == "categorical":
            return float(h.softmax(-1).amax(-1).mean())
        return float(torch.sigmoid(h.abs()).mean())


class Tokens(nn.Module):
    """Logits of a transformers GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=5, n_positions=4, bos_token_id=0,
            eos_token_id=0, use_cache=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        self.lm = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm(tokens).logits


def make_pool(name: str) -> Pool:
    """The pool of that name, untrained, in float64."""
    torch.manual_seed(0)
    if name == "GPT-2":
        kinds = [string.ascii_lowercase, string.ascii_uppercase + string.digits, "_", " \n"]
        text = Path(string.__file__).read_text(encoding="utf-8")[2000:]
        codes = [next((i for i, kind in enumerate(kinds) if c in kind), 4) for c in text]
        tokens = torch.tensor(codes[: 160 * 5]).view(160, 5)
        return Pool(Tokens().double(), tokens[:, :4], tokens[:, 1:], "categorical")
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:600]) / 16, torch.tensor(digits[:600])
    if name == "MLP":
        model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
        return Pool(model.double(), x, y, "categorical")
    if name == "CNN":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
        return Pool(model.double(), x, y, "categorical")
    even, high, round_ = y % 2 == 0, y > 4, (y == 0) | (y == 6) | (y == 8) | (y == 9)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3))
    return Pool(model.double(), x, torch.stack([even, high, round_], 1).double(), "bernoulli")


@dataclass
class Truth:
    """Over all inputs: diag F, and (V_x + V_y)/‖diag F‖² of one pair, by estimator."""

    diagonal: Tensor
    pair: dict[str, float]

    @property
    def trace(self) -> float:
        return float(self.diagonal.sum())


@torch.no_grad()
def enumerate_pool(pool: Pool) -> Truth:
    """From differences of the outputs h [N, T, C] along every parameter."""
    h = pool.model(pool.inputs)
    middle = h.reshape(len(h), -1, h.shape[-1] if pool.family == "categorical" else 1)
    parts = []
    for above, below in _outputs_beside(pool):
        above, below = above.view(-1, *middle.shape), below.view(-1, *middle.shape)
        slope, bend = (above - below) / (2 * STEP), (above - 2 * middle + below) / STEP**2
        parts.append(_by_position(pool.family, middle, slope, bend))
    positions, g4, r2, l4 = map(torch.cat, zip(*parts, strict=True))  # [P, N, T]
    f = positions.sum(-1)  # [P, N]
    diagonal = f.mean(1)
    norm = diagonal.square().sum()

    def relative(square: Tensor) -> float:
        return float(square.sum(0).mean() / norm - 1)

    return Truth(
        diagonal,
        {
            # fourth cumulants of independent labels add
            "i1": relative((g4 - 3 * positions.square()).sum(-1) + 3 * f.square()),
            "i2": relative(f.square() + r2.sum(-1)),
            "ih": relative(3 * f.square() - 2 * l4.sum(-1)),
        },
    )


def _outputs_beside(pool: Pool) -> Iterator[tuple[Tensor, Tensor]]:
    """The outputs one step above and below the parameters, up to 64 of these at a time."""
    parameters = {name: p.detach() for name, p in pool.model.named_parameters()}

    def outputs(changed: dict[str, Tensor]) -> Tensor:
        return functional_call(pool.model, parameters | changed, (pool.inputs,))

    for name, p in parameters.items():
        for rows in torch.eye(p.numel(), dtype=p.dtype).split(64):
            step = STEP * rows.view(-1, *p.shape)
            with sdpa_kernel(SDPBackend.MATH):  # the other one has no rule for vmap
                yield vmap(outputs)({name: p + step}), vmap(outputs)({name: p - step})


def _by_position(
    family: str, h: Tensor, slope: Tensor, bend: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E g², E g⁴, E R² over the labels of each position, and Σ (LᵀJ)⁴, [P, N, T]."""
    if family == "categorical":
        p = h.softmax(-1)
        g = slope - (p * slope).sum(-1, keepdim=True)  # of label y: slope_y − mean
        r = bend - (p * bend).sum(-1, keepdim=True)
        root = p.sqrt() * g  # Lᵀ slope
        return tuple(x.sum(-1) for x in (p * g.square(), p * g.pow(4), p * r.square(), root.pow(4)))  # type: ignore[return-value]
    p = torch.sigmoid(h)
    v = p * (1 - p)
    g4 = v * (p.pow(3) + (1 - p).pow(3)) * slope.pow(4)
    parts = (v * slope.square(), g4, v * bend.square(), v.square() * slope.pow(4))
    return tuple(x.sum(-1) for x in parts)  # type: ignore[return-value]
