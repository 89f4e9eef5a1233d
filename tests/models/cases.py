"""Small models of every kind the engine claims to cover, each with a batch that fits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Case(NamedTuple):
    model: nn.Module
    inputs: Any
    classes: int = 3
    positions: int = 1
    covered_by: str = ""  # expected in the coverage of at least one parameter


class Lambda(nn.Module):
    def __init__(self, f: Callable[..., Any], *modules: nn.Module, **named: Any) -> None:
        super().__init__()
        self.f = f
        self.parts = nn.ModuleList(modules)
        for name, x in named.items():
            setattr(self, name, x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(self, *args, **kwargs)


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 3))


def net(layer: nn.Module, x: Tensor, *, after: nn.Module | None = None) -> Case:
    """A layer behind a nonlinearity and a linear head, so that δ reaches it dense."""
    body = nn.Sequential(layer, after or nn.Tanh())
    with torch.no_grad():
        width = body.eval()(x)[0].numel()
    return Case(nn.Sequential(body, head(width)), (x,))


def mlp() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return Case(model, (torch.randn(5, 4),), covered_by="Linear rule")


class Attention(nn.Module):
    """Tied embedding and decoder, a module used twice, a raw parameter, positions by [T] index."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(3, 4)
        self.place = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 12)
        self.twice = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.randn(4))
        self.decode = nn.Linear(4, 3, bias=False)
        self.decode.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.twice(torch.tanh(self.twice(x))) * self.scale
        return self.decode(x)


def attention() -> Case:
    return Case(Attention(), (torch.randint(3, (4, 3)),), positions=3, covered_by="replay")


def lstm(**options: Any) -> Case:
    options = {"batch_first": True} | options
    layer = nn.LSTM(3, 4, **options)
    x = torch.randn(4, 5, 3) if options["batch_first"] else torch.randn(5, 4, 3)

    def f(self: Any, x: Tensor) -> Tensor:
        out, (h, c) = self.parts[0](x)
        last = out[:, -1] if options["batch_first"] else out[-1]
        return self.parts[1](last) + self.parts[2](c[-1])

    width = (options.get("proj_size") or 4) * (2 if options.get("bidirectional") else 1)
    model = Lambda(f, layer, nn.Linear(width, 3), nn.Linear(4, 3))
    if not options["batch_first"]:  # the model's own batch stays first
        inner = model
        model = Lambda(lambda self, x: self.parts[0](x.transpose(0, 1)), inner)
        x = x.transpose(0, 1)
    return Case(model, (x,), covered_by="written out")


def recurrent(kind: type[nn.Module], **options: Any) -> Case:
    layer = kind(3, 4, batch_first=True, num_layers=2, **options)
    model = Lambda(lambda self, x: self.parts[1](self.parts[0](x)[0][:, -1]), layer, nn.Linear(4, 3))
    return Case(model, (torch.randn(4, 5, 3),), covered_by="written out")


def multihead(batch_first: bool, **options: Any) -> Case:
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
    width = options.get("kdim", 4)

    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def f(self: Any, x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
        if not batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        out = self.parts[0](x, y, y, key_padding_mask=padding, need_weights=False)[0]
        return self.parts[1](out.mean(1 if batch_first else 0))

    model = Lambda(f, layer, nn.Linear(4, 3))
    x, y = torch.randn(3, 2, 4), torch.randn(3, 5, width)
    return Case(model, (x, y, padding))


def self_attention() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = Lambda(lambda self, x: self.parts[1](self.parts[0](x)[:, 0]), encoder, nn.Linear(4, 3))
    return Case(model, (torch.randn(3, 4, 4),), covered_by="MultiheadAttention written out")


def sequence_first_encoder() -> Case:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6), 1, enable_nested_tensor=False
    )
    model = Lambda(
        lambda self, x: self.parts[1](self.parts[0](x.transpose(0, 1))[0]), encoder, nn.Linear(4, 3)
    )
    return Case(model, (torch.randn(3, 3, 4),))  # T = B: shapes alone would mislead


def packed() -> Case:
    def f(self: Any, x: Tensor, lengths: Tensor) -> Tensor:
        seq = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.parts[1](self.parts[0](seq)[1][0])

    model = Lambda(f, nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3))
    return Case(model, (torch.randn(4, 5, 3), torch.tensor([5, 2, 4, 1])), covered_by="loop")


def old_weight_norm() -> Case:
    layer = nn.utils.weight_norm(nn.Linear(4, 5))
    return net(layer, torch.randn(4, 4))


class LoRALinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


class SubLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2).sin()


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def functional_tie() -> Case:
    def f(self: Any, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.parts[0](tokens)).mean(1)
        return F.linear(x, self.parts[0].weight)

    return Case(Lambda(f, nn.Embedding(3, 4)), (torch.randint(3, (4, 3)),), covered_by="whole model")


def folded() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:  # video: frames folded into the batch
        y = self.parts[1](self.parts[0](x.flatten(0, 1)))
        y = self.parts[2](y).tanh().flatten(1)
        return self.parts[3](y).unflatten(0, x.shape[:2]).sum(1)

    parts = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.PReLU(2), nn.Linear(8, 3)
    return Case(Lambda(f, *parts), (torch.randn(4, 2, 1, 3, 3),))


def unfolded_time_major() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:  # [B, T, d] -> [T·B, d]: folded the other way round
        y = torch.tanh(self.parts[0](x.transpose(0, 1).flatten(0, 1)))
        return self.parts[1](y.unflatten(0, (x.shape[1], x.shape[0])).sum(0))

    return Case(Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3)), (torch.randn(3, 5, 4),))


def conv1d_transformers() -> Case:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5))
    for p in model.parameters():
        nn.init.normal_(p)
    return Case(model, (torch.randn(4, 4),))


class Shifts(nn.Module):
    """Two parameters with the very same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a + self.b


def shared_deltas() -> Case:
    """Residual branches hand one and the same δ to several layers."""

    def f(self: Any, x: Tensor) -> Tensor:
        y = self.parts[0](x) + self.parts[1](x) + self.parts[2](x)
        return self.parts[4](torch.tanh(self.parts[3](y)))

    parts = nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 4), Shifts(), nn.Linear(4, 3)
    return Case(Lambda(f, *parts), (torch.randn(4, 4),))


def lively(model: nn.Module) -> nn.Module:
    """Weights of size one half: near uniform labels V_y is a small difference of large numbers."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_embd=4, n_head=2, vocab_size=3, n_positions=4, bos_token_id=0, eos_token_id=0
    )
    model = lively(Lambda(lambda self, t: self.parts[0](t).logits, GPT2LMHeadModel(config)))
    return Case(model, (torch.randint(3, (3, 2)),), positions=2, covered_by="Conv1D rule")


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=7,
        max_position_embeddings=8,
        num_labels=3,
    )
    net = BertForSequenceClassification(config)
    model = lively(Lambda(lambda self, t: self.parts[0](t).logits, net))
    return Case(model, (torch.randint(7, (3, 4)),))


def experts() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:
        route = self.parts[0](x).argmax(-1)
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for i, expert in enumerate(self.parts[1:]):
            where = (route == i).nonzero().flatten()
            if len(where):
                out = out.index_add(0, where, expert(x[where]))
        return out

    return Case(Lambda(f, *(nn.Linear(4, 3) for _ in range(4))), (torch.randn(6, 4),))


def bag(mode: str, weighted: bool = False) -> Case:
    layer = nn.EmbeddingBag(6, 4, mode=mode, padding_idx=0)
    tokens = torch.randint(6, (4, 5))
    if weighted:
        model = Lambda(
            lambda self, t, w: self.parts[1](torch.tanh(self.parts[0](t, per_sample_weights=w))),
            layer,
            nn.Linear(4, 3),
        )
        return Case(model, (tokens, torch.rand(4, 5)))
    return Case(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)), (tokens,))


def bilinear() -> Case:
    model = Lambda(
        lambda self, x, y: self.parts[1](torch.tanh(self.parts[0](x, y))),
        nn.Bilinear(3, 4, 5),
        nn.Linear(5, 3),
    )
    return Case(model, (torch.randn(4, 3), torch.randn(4, 4)))


def batch_norm() -> Case:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), head(8))
    for _ in range(3):
        model.train()(torch.randn(6, 1, 3, 3))
    return Case(model, (torch.randn(4, 1, 3, 3),))


def norm(layer: nn.Module, x: Tensor) -> Case:
    for p in layer.parameters():
        nn.init.normal_(p)
    return net(layer, x)


def lookups() -> Case:
    layer = nn.Embedding(7, 4, padding_idx=2)
    return net(layer, torch.randint(7, (4, 3)))


def one_position_lookup() -> Case:
    def f(self: Any, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).unsqueeze(0)
        return self.parts[2](torch.tanh(self.parts[0](tokens) + self.parts[1](places)).sum(1))

    model = Lambda(f, nn.Embedding(5, 4), nn.Embedding(3, 4), nn.Linear(4, 3))
    return Case(model, (torch.randint(5, (3, 3)),), covered_by="Embedding rule")


def class_token() -> Case:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(1, 4, 2, 2)
            self.cls = nn.Parameter(torch.randn(1, 1, 4))
            self.place = nn.Parameter(torch.randn(1, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.patch(x).flatten(2).transpose(1, 2)
            return torch.cat([self.cls.expand(len(x), -1, -1), y], 1) + self.place

    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
    model = Lambda(
        lambda self, x: self.parts[2](self.parts[1](self.parts[0](x))[:, 0]),
        Tokens(),
        layer,
        nn.Linear(4, 3),
    )
    return Case(model, (torch.randn(3, 1, 4, 4),), covered_by="replay of parts.0 (vmap)")


def parametrised() -> Case:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    return net(layer, torch.randn(4, 4))


def shared_layer_tied_weight() -> Case:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    return Case(
        nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), a, nn.Tanh(), nn.Linear(4, 3)),
        (torch.randn(4, 4),),
    )


class SharedScale(nn.Module):
    """A parameter of its own, and a layer's weight used beside the layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.borrowed, self.own = weight, nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.borrowed) * self.own


def tied_to_raw() -> Case:
    first = nn.Linear(4, 4)
    return Case(
        nn.Sequential(first, nn.Tanh(), SharedScale(first.weight), nn.Linear(4, 3)),
        (torch.randn(4, 4),),
    )


class Reading(nn.Module):
    """A parameter of its own beside what it is handed: a table without a batch, or another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, other: Any) -> Tensor:
        y = other(x) if isinstance(other, nn.Module) else x @ other
        return torch.sin(y * self.scale)


def input_without_batch(size: int = 5) -> Case:
    """As relative positions are handed to attention."""

    def f(self: Any, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x, torch.tanh(self.table)))

    table = nn.Parameter(torch.randn(4, 4))
    return Case(Lambda(f, Reading(), nn.Linear(4, 3), table=table), (torch.randn(size, 4),))


def layer_as_argument() -> Case:
    """As DoRA's magnitude is handed the adapter's layers."""

    def f(self: Any, x: Tensor) -> Tensor:
        return self.parts[2](self.parts[0](x, self.parts[1]) + x)

    return Case(Lambda(f, Reading(), nn.Linear(4, 4), nn.Linear(4, 3)), (torch.randn(4, 4),))


class Gate(nn.Module):
    """Two parameters that no rule covers, whatever dimension holds the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.a) * self.b


def folded_gate() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:  # as answers of multiple choice
        y = self.parts[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.parts[1](y.sum(1))

    return Case(
        Lambda(f, Gate(), nn.Linear(4, 3)), (torch.randn(3, 2, 4),), covered_by="replay of parts.0"
    )


def time_major_gate() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:  # as in XLNet
        return self.parts[1](self.parts[0](x.transpose(0, 1)).sum(0))

    return Case(
        Lambda(f, Gate(), nn.Linear(4, 3)), (torch.randn(3, 3, 4),), covered_by="replay of parts.0"
    )


class Biased(nn.Module):
    """Hands a table without batch on to the next layer, as T5's first attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.places = nn.Linear(4, 4), nn.Embedding(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.places(torch.arange(9).view(3, 3) % 3)[..., 0]
        return torch.tanh(self.linear(bias @ x)), bias


def handed_on_table() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:
        y, bias = self.parts[0](x)
        return self.parts[1]((bias @ y).sum(1))

    return Case(
        Lambda(f, Biased(), nn.Linear(4, 3)), (torch.randn(4, 3, 4),), covered_by="Linear rule"
    )


def scalar_parameter() -> Case:
    def f(self: Any, x: Tensor) -> Tensor:
        return self.parts[0](x) * self.temperature.exp()

    return Case(
        Lambda(f, nn.Linear(4, 3), temperature=nn.Parameter(torch.tensor(0.3))),
        (torch.randn(4, 4),),
    )


def module_with_two_paths() -> Case:
    """As CoaT's position encodings: one module in two places, inside a module without rules."""

    def f(self: Any, x: Tensor) -> Tensor:
        y = torch.tanh(self.parts[0](x) * self.scale)
        return self.parts[2](torch.tanh(self.parts[1](y) * self.scale))

    shared = nn.Linear(4, 4)
    model = Lambda(f, shared, shared, nn.Linear(4, 3), scale=nn.Parameter(torch.rand(4)))
    return Case(model, (torch.randn(4, 4),), covered_by="whole model")


def parameter_list() -> Case:
    weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3))])
    return Case(
        Lambda(lambda self, x: torch.tanh(x @ self.w[0]) @ self.w[1], w=weights),
        (torch.randn(4, 4),),
    )


_ONE = lambda: torch.randn(3, 4, 9)  # noqa: E731
_TWO = lambda: torch.randn(3, 4, 6, 5)  # noqa: E731
_THREE = lambda: torch.randn(2, 2, 4, 5, 4)  # noqa: E731

CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "linear on sequences": lambda: net(nn.Linear(4, 5), torch.randn(4, 3, 4)),
    "bilinear": bilinear,
    "conv1d": lambda: net(nn.Conv1d(4, 2, 3), _ONE()),
    "conv1d stride dilation groups": lambda: net(
        nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=3), _ONE()
    ),
    "conv1d same dilated": lambda: net(nn.Conv1d(4, 2, 4, padding="same", dilation=2), _ONE()),
    "conv2d": lambda: net(nn.Conv2d(4, 3, 3, padding=1), _TWO()),
    "conv2d many taps": lambda: net(
        nn.Conv2d(8, 2, (3, 4), stride=(1, 2), padding=(2, 1)), torch.randn(3, 8, 4, 5)
    ),
    "conv2d few taps": lambda: net(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        torch.randn(3, 2, 6, 5),
    ),
    "conv2d rectangular": lambda: net(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), _TWO()
    ),
    "conv2d depthwise no bias": lambda: net(nn.Conv2d(4, 4, 3, groups=4, bias=False), _TWO()),
    "conv2d same": lambda: net(nn.Conv2d(4, 2, (2, 3), padding="same"), _TWO()),
    "conv2d valid": lambda: net(nn.Conv2d(4, 2, 3, padding="valid"), _TWO()),
    **{
        f"conv2d {mode}": lambda mode=mode: net(
            nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode=mode, stride=2), _TWO()
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d circular same": lambda: net(
        nn.Conv2d(4, 2, 3, padding="same", padding_mode="circular"), _TWO()
    ),
    "conv3d": lambda: net(nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), _THREE()),
    "conv3d groups dilation": lambda: net(nn.Conv3d(2, 4, 2, groups=2, dilation=2), _THREE()),
    "convtranspose1d": lambda: net(
        nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1), _ONE()
    ),
    "convtranspose2d": lambda: net(
        nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, dilation=(1, 2)), _TWO()
    ),
    "convtranspose2d output size": lambda: Case(
        Lambda(
            lambda self, x: self.parts[1](torch.tanh(self.parts[0](x, output_size=(12, 10)))),
            nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1),
            head(120),
        ),
        (_TWO(),),
    ),
    "convtranspose3d": lambda: net(nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False), _THREE()),
    "embedding padding_idx": lookups,
    "embedding [1, T] index, T = B": one_position_lookup,
    "bag sum": lambda: bag("sum"),
    "bag mean": lambda: bag("mean"),
    "bag max": lambda: bag("max"),
    "bag weighted": lambda: bag("sum", weighted=True),
    "layer norm": lambda: norm(nn.LayerNorm(4), torch.randn(4, 3, 4)),
    "layer norm 2d": lambda: norm(nn.LayerNorm((3, 4)), torch.randn(4, 3, 4)),
    "rms norm": lambda: norm(nn.RMSNorm(4), torch.randn(4, 3, 4)),
    "rms norm of one's own": lambda: net(RMS(), torch.randn(4, 3, 4)),
    "group norm": lambda: norm(nn.GroupNorm(2, 4), _TWO()),
    "group norm 2-D": lambda: norm(nn.GroupNorm(2, 4), torch.randn(3, 4)),
    "instance norm": lambda: norm(nn.InstanceNorm2d(4, affine=True), _TWO()),
    "instance norm running": lambda: norm(
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True), _ONE()
    ),
    "batch norm": batch_norm,
    "batch norm 1d": lambda: norm(nn.BatchNorm1d(4), torch.randn(3, 4)),
    "batch norm 1d sequence": lambda: norm(nn.BatchNorm1d(4), _ONE()),
    "prelu": lambda: net(nn.PReLU(), _TWO()),
    "prelu channels": lambda: net(nn.PReLU(4), _TWO()),
    "multihead self": self_attention,
    "multihead batch first": lambda: multihead(True),
    "multihead sequence first": lambda: multihead(False, add_zero_attn=True),
    "multihead kdim": lambda: multihead(True, kdim=3, vdim=3),
    "multihead bias_kv": lambda: multihead(True, add_bias_kv=True),
    "encoder, sequence first, T = B": sequence_first_encoder,
    "lstm": lstm,
    "lstm sequence first": lambda: lstm(batch_first=False),
    "lstm deep bidirectional projected": lambda: lstm(num_layers=2, bidirectional=True, proj_size=2),
    "gru": lambda: recurrent(nn.GRU),
    "rnn relu no bias": lambda: recurrent(nn.RNN, nonlinearity="relu", bias=False),
    "packed sequences": packed,
    "attention net": attention,
    "transformers Conv1D": conv1d_transformers,
    "lora": lambda: net(LoRALinear(), torch.randn(4, 3, 4)),
    "subclass": lambda: net(SubLinear(4, 5), torch.randn(4, 4)),
    "parametrised": parametrised,
    "old weight norm": old_weight_norm,
    "functional tie": functional_tie,
    "tied and reused": shared_layer_tied_weight,
    "folded frames": folded,
    "time-major fold": unfolded_time_major,
    "shared deltas": shared_deltas,
    "GPT-2, tied": gpt2,
    "BERT": bert,
    "experts": experts,
    "class token": class_token,
    "input without a batch": input_without_batch,
    "input without a batch, as long": lambda: input_without_batch(4),
    "layer as argument": layer_as_argument,
    "raw parameters, folded": folded_gate,
    "raw parameters, time first, T = B": time_major_gate,
    "table handed on": handed_on_table,
    "module with two paths": module_with_two_paths,
    "scalar parameter": scalar_parameter,
    "tied to a raw parameter": tied_to_raw,
    "parameter list": parameter_list,
}
