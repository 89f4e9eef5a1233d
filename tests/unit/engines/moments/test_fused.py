"""The fused kernel through Triton's interpreter, against dense per-sample gradients in float64."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import triton  # a CI without it fails: these tests are the kernel's only ones without a GPU
from torch import nn

import fimprobe
from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.moments import fused
from fimprobe.engines.moments import triton_kernel as kernel
from fimprobe.engines.moments.accumulators import MomentAccumulators
from fimprobe.engines.moments.contraction import Contraction, reached_uses
from fimprobe.engines.problem.weights import PassWeights
from fimprobe.engines.tracing.tape import ParameterUse
from tests.support.fresh_process import run_fresh
from tests.support.paths import ROOT

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel runs on CPU tensors; what it is called with is counted."""
    assert triton.knobs.runtime.interpret, "conftest sets TRITON_INTERPRET before triton is imported"
    calls = []

    def launch(*arguments, **constants):
        calls.append(constants)
        return original(*arguments, **constants)

    original = kernel.launch
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(kernel, "launch", launch)
    return calls


def oracle(g, weights=None):
    """All moments of g [B, S, O, I], in float64."""
    g = g.double()
    square = g.square()
    w = torch.ones(g.shape[:2], dtype=torch.float64)
    if weights is not None and weights.square is not None:
        w = weights.square.double()
    w4 = torch.ones_like(w) if weights is None else weights.quartic.double()
    f = torch.einsum("bs,bsoi->boi", w, square)
    a4 = torch.einsum("bs,bsoi->oi", w4, square.square())
    sampled = weights is None or weights.square is None
    r = square.square().sum((0, 1)) if sampled else f.square().sum(0)  # each drawn label is a block
    c = torch.zeros_like(w)
    if weights is not None and weights.coincidences is not None:
        c = weights.coincidences
    flat = g.flatten(2)
    gram = flat @ flat.mT
    return {
        "a2": f.sum(0),
        "a4_sum": a4.sum(),
        "q_sum": f.square().sum(),
        "r_sum": r.sum(),
        "top_sum": torch.einsum("bs,bsoi->", c, square.square())
        if sampled
        else (f * square.amax(1)).sum(),
        "gram": gram if g.shape[1] > 1 else None,
        "squared_norms": flat.square().sum(-1),
        "a4": a4,
        "q": f.square().sum(0),
        "r": r,
        "a2_sum": f.sum(),
        "a2_square": f.sum(0).square().sum(),
    }


def check(moments, want, rtol):
    """Every field within ``rtol`` of its largest entry."""
    for name, value in want.items():
        have = getattr(moments, name)
        if have is None or value is None:
            assert value is None or name in ("a4", "q", "r"), name
            continue
        have = torch.as_tensor(have, dtype=torch.float64)
        assert have.shape == value.shape, name
        error = float((have - value).abs().max() / value.abs().max().clamp(min=1e-300))
        assert error <= rtol, (name, error)


def measure(uses, deltas, shape, *, weights=None, diagonals=False, dtype=torch.float32):
    """Moments by the engine's own entry."""
    ledger = MomentAccumulators.of({"weight": torch.empty(shape, dtype=dtype)}, diagonals=diagonals)
    take(ledger, uses, deltas, weights)
    second = None if weights is None else weights.square
    return ledger.finish(ledger.totals(), second, ())["weight"]


def take(ledger, uses, deltas, weights=None):
    size, draws = len(deltas[0][0]), len(deltas[0])
    ledger.start_chunk(size, draws)
    met = reached_uses(uses, deltas, size)
    Contraction(size, weights, 2**30).add(ledger.accumulators["weight"], met)


def use(module, given, edge=0):
    call = LayerCall(module, (given,))
    return ParameterUse(rule=rules_for(module)["weight"], call=call, edge=edge, layout=0)


def random(b, s, t, o, i, *, dtype=torch.float32, scale=1.0):
    """x and δ, rounded to their type: the oracle sees the same numbers."""
    x = torch.randn(b, t, i).to(dtype)
    return x, [(scale * torch.randn(b, t, o)).to(dtype) for _ in range(s)]


def dense(x, deltas):
    return torch.stack([torch.einsum("bto,bti->boi", d.double(), x.double()) for d in deltas], 1)


# the kernel sums T products in float32, and tiles of squares; operands are not rounded further
ROUNDING = 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",  # B, S, T, outputs, inputs
    [
        (1, 1, 1, 1, 1),
        (1, 1, 1, 70, 3),
        (3, 1, 37, 65, 130),
        (2, 2, 64, 64, 64),
        (5, 3, 33, 7, 65),
        (4, 4, 2, 129, 5),
    ],
)
def test_moments_equal_those_of_dense_gradients(sizes, dtype, interpreted):
    o, i = sizes[3:]
    x, deltas = random(*sizes, dtype=dtype)
    moments = measure([use(nn.Linear(i, o), x)], [deltas], (o, i))
    check(moments, oracle(dense(x, deltas)), ROUNDING)
    assert len(interpreted) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_program_takes_several_inputs(dtype, interpreted, monkeypatch):
    """Of more inputs than there are programs, which the interpreter runs one by one: few of both."""
    monkeypatch.setattr(fused, "MIN_PROGRAMS", 4)
    x, deltas = random(11, 1, 2, 3, 2, dtype=dtype)
    moments = measure([use(nn.Linear(2, 3), x)], [deltas], (3, 2))
    check(moments, oracle(dense(x, deltas)), ROUNDING)
    assert len(interpreted) == 1


@pytest.mark.parametrize("configuration", kernel.CONFIGURATIONS, ids=str)
def test_every_tile_gives_the_same(configuration, monkeypatch):
    monkeypatch.setattr(kernel, "CONFIGURATIONS", [configuration])
    x, deltas = random(2, 2, 70, 131, 140)
    moments = measure([use(nn.Linear(140, 131), x)], [deltas], (131, 140))
    check(moments, oracle(dense(x, deltas)), ROUNDING)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e15, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fourth_powers_keep_their_digits_at_any_scale(scale, dtype):
    x, deltas = random(3, 2, 9, 66, 5, dtype=dtype, scale=scale)
    moments = measure([use(nn.Linear(5, 66), x)], [deltas], (66, 5))
    want = oracle(dense(x, deltas))
    if scale < 1e-15:  # squares per entry are kept in float32, whose range ends at 1e-38
        small = {"a2", "a2_sum", "a2_square"}
        assert torch.equal(moments.a2, moments.a2.abs())
        assert float((moments.a2.double() - want["a2"]).abs().max()) <= 2.0**-146
        want = {k: v for k, v in want.items() if k not in small}
    check(moments, want, ROUNDING)


def test_samples_of_unlike_size_do_not_spoil_each_other():
    x, deltas = random(4, 1, 6, 67, 4)
    deltas[0] *= torch.tensor([1e-14, 1.0, 1e-7, 1e8])[:, None, None]
    moments = measure([use(nn.Linear(4, 67), x)], [deltas], (67, 4))
    want = oracle(dense(x, deltas))
    have, norms = moments.squared_norms.squeeze(1), want["squared_norms"].squeeze(1)
    assert ((have - norms).abs() <= ROUNDING * norms).all()
    check(moments, want, ROUNDING)


def test_gradients_below_float32s_normal_range_count():
    """Tiles whose largest entry is subnormal: a scale of 2^-126 still keeps their powers."""
    x, deltas = random(2, 2, 9, 66, 5, scale=1e-40)
    moments = measure([use(nn.Linear(5, 66), x)], [deltas], (66, 5))
    want = oracle(dense(x, deltas))
    kept = {k: want[k] for k in ("squared_norms", "gram", "a4_sum", "q_sum")}
    check(moments, kept, 1e-4)  # subnormals have some 16 bits here
    assert moments.a4_sum > 0


def test_zero_and_not_finite_gradients():
    x, deltas = random(3, 1, 6, 67, 4)
    deltas[0][1] = 0
    moments = measure([use(nn.Linear(4, 67), x)], [deltas], (67, 4))
    check(moments, oracle(dense(x, deltas)), ROUNDING)
    assert float(moments.squared_norms[1]) == 0
    for bad in (float("nan"), float("inf")):
        deltas[0][2, 3, 66] = bad
        moments = measure([use(nn.Linear(4, 67), x)], [deltas], (67, 4))
        assert not torch.isfinite(torch.tensor([moments.a4_sum, moments.a2_sum])).any()
        assert torch.isfinite(moments.squared_norms[:2]).all()


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_weights_of_exact_passes(draws):
    x, deltas = random(4, draws, 11, 70, 66)
    p = torch.rand(4, draws, dtype=torch.float64).softmax(1)
    p[0, 0] = 1e-30
    weights = PassWeights(p, p.square(), [0] * draws)
    moments = measure([use(nn.Linear(66, 70), x)], [deltas], (70, 66), weights=weights)
    check(moments, oracle(dense(x, deltas), weights), ROUNDING)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_weights_of_size_biased_draws(draws):
    x, deltas = random(4, draws, 11, 70, 66)
    inverse = torch.rand(4, draws, dtype=torch.float64)
    inverse[0, 0] = 1e-12
    coincidences = torch.rand(4, draws, dtype=torch.float64)
    weights = PassWeights(None, inverse, list(range(draws)), coincidences)
    moments = measure([use(nn.Linear(66, 70), x)], [deltas], (70, 66), weights=weights)
    check(moments, oracle(dense(x, deltas), weights), ROUNDING)


@pytest.mark.parametrize("weighted", [None, "exact", "size-biased"])
@pytest.mark.parametrize("draws", [1, 2])
def test_diagonals(draws, weighted):
    x, deltas = random(4, draws, 11, 70, 66, scale=1e-9)
    p = torch.rand(4, draws, dtype=torch.float64).softmax(1)
    weights = None
    if weighted == "exact":
        weights = PassWeights(p, p, [0] * draws)
    elif weighted == "size-biased":
        weights = PassWeights(None, p, list(range(draws)))
    moments = measure(
        [use(nn.Linear(66, 70), x)], [deltas], (70, 66), weights=weights, diagonals=True
    )
    assert moments.a4 is not None
    check(moments, oracle(dense(x, deltas), weights), ROUNDING)


def test_the_transposed_weight_of_transformers():
    from transformers.pytorch_utils import Conv1D

    x, deltas = random(3, 2, 17, 70, 66, dtype=torch.bfloat16)
    moments = measure([use(Conv1D(70, 66), x)], [deltas], (66, 70), diagonals=True)
    check(moments, oracle(dense(x, deltas).mT), ROUNDING)


def lookup(tokens, rows, vocabulary, padding=None):
    """Per-sample gradients of an embedding by scattering, in float64."""
    b, k, d = rows[0].shape
    g = torch.zeros(b, len(rows), vocabulary, d, dtype=torch.float64)
    for sample in range(b):
        for s, row in enumerate(rows):
            for at in range(k):
                if tokens[sample, at] != padding:
                    g[sample, s, tokens[sample, at]] += row[sample, at].double()
    return g


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 3])
def test_lookups_alone_and_with_the_head_they_are_tied_to(padding, dtype, interpreted):
    vocabulary, d, b, t = 150, 20, 3, 70
    embedding, head = nn.Embedding(vocabulary, d, padding_idx=padding), nn.Linear(d, vocabulary)
    tokens = torch.randint(vocabulary, (b, t))
    tokens[0] = 3
    rows = [torch.randn(b, t, d).to(dtype) for _ in range(2)]
    x, deltas = random(b, 2, t, vocabulary, d, dtype=dtype)
    alone = measure([use(embedding, tokens)], [rows], (vocabulary, d))
    found = lookup(tokens, rows, vocabulary, padding)
    check(alone, oracle(found), ROUNDING)
    tied = measure([use(embedding, tokens), use(head, x, 1)], [rows, deltas], (vocabulary, d))
    check(tied, oracle(found + dense(x, deltas)), ROUNDING)
    assert [(c["DENSE"], c["LOOKUP"]) for c in interpreted] == [(False, True), (True, True)]


def test_operands_are_read_where_they_lie():
    """Strided, batch second, more than one dimension of positions, unlike strides of the draws."""
    x = torch.randn(7, 3, 5, 40)[..., ::2].transpose(0, 1)
    one = torch.randn(7, 3, 5, 66).transpose(0, 1)
    deltas = [one, torch.randn(3, 7, 5, 66)]
    moments = measure([use(nn.Linear(20, 66), x)], [deltas], (66, 20))
    flat = [d.flatten(1, 2) for d in deltas]
    check(moments, oracle(dense(x.flatten(1, 2), flat)), ROUNDING)


def test_chunks_add_up():
    x, deltas = random(5, 2, 9, 66, 5)
    ledger = MomentAccumulators.of({"weight": torch.empty(66, 5)}, diagonals=True)
    for rows in (slice(0, 2), slice(2, 5)):
        part = [d[rows] for d in deltas]
        take(ledger, [use(nn.Linear(5, 66), x[rows])], [part])
    check(ledger.finish(ledger.totals(), None, ())["weight"], oracle(dense(x, deltas)), ROUNDING)


def test_what_the_kernel_does_not_cover_takes_the_plain_path(interpreted):
    linear = nn.Linear(5, 6)
    cases = {
        "float64": random(2, 1, 3, 6, 5, dtype=torch.float64),
        "five draws": random(2, 5, 3, 6, 5),
        "no shared positions": (torch.randn(2, 5), [torch.randn(2, 6)]),
    }
    for x, deltas in cases.values():
        if x.dim() == 3:
            want = oracle(dense(x, deltas))
        else:
            want = oracle(dense(x[:, None], [d[:, None] for d in deltas]))
        check(measure([use(linear, x)], [deltas], (6, 5), dtype=x.dtype), want, ROUNDING)
    x, deltas = random(2, 2, 3, 6, 5)
    blocks = PassWeights(torch.ones(2, 2), torch.ones(2, 2), [0, 1])
    assert measure([use(linear, x)], [deltas], (6, 5), weights=blocks).r_sum > 0
    twice = [use(linear, x), use(linear, x, 1)]
    check(measure(twice, [deltas, deltas], (6, 5)), oracle(2 * dense(x, deltas)), ROUNDING)
    assert interpreted == []


class Words(nn.Module):
    """Lookup, position-shared layers and a head, tied or not."""

    def __init__(self, tied):
        super().__init__()
        self.words = nn.Embedding(70, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 70, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.words(tokens))))


def gpt2(tied):
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 70, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    ("make", "tied", "draws"),
    [
        *((Words, True, 1), (Words, False, 2), (gpt2, True, 2), (gpt2, False, 1)),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((Words, True, 2), (Words, False, 1), (gpt2, True, 1), (gpt2, False, 2))
        ),
    ],
)
def test_a_measurement_agrees_with_the_plain_path_and_with_float64(
    make, tied, draws, interpreted, monkeypatch, raw_numbers
):
    torch.manual_seed(1)
    model = make(tied).eval()
    batch = torch.randint(70, (5, 9))
    inputs = batch if make is Words else {"input_ids": batch}
    options = {"likelihood": "categorical", "draws": draws, "diagonals": True}
    options |= {"estimators": ["i1"], "bounds": False, "seed": 5}
    fast = fimprobe.measure(model, inputs, **options)
    used = {(c["DENSE"], c["LOOKUP"]) for c in interpreted}
    assert used >= ({(True, True)} if tied else {(True, False), (False, True)})
    monkeypatch.setattr(fused, "INTERPRET", False)
    plain = fimprobe.measure(model, inputs, **options)
    exact = fimprobe.measure(model.double(), inputs, **options)
    for name, group in (*exact.parameters.items(), ("", exact.total)):
        for report in (fast, plain):
            have = (report.parameters[name] if name else report.total).i1
            for field in dataclasses.fields(have):
                value, want = getattr(have, field.name), getattr(group.i1, field.name)
                if isinstance(want, float):
                    size = max(abs(want), 1e-4 * abs(group.i1.norm) ** 2)
                    assert abs(value - want) <= 1e-3 * size, (name, field.name, value, want)
                elif isinstance(want, dict) and field.name != "unknown":
                    for n, tensor in want.items():
                        error = (value[n].double() - tensor).abs().max() / tensor.abs().max()
                        assert error < 1e-3, (name, field.name, n)


def test_the_guard_takes_the_fused_path_too(monkeypatch):
    """A kernel that came out wrong on a device is found on the first measurement."""
    original = fused.add_fused

    def wrong(accumulator, operands, weights):
        original(accumulator, operands, weights)
        accumulator.a2 *= 1.5

    from fimprobe.engines.moments import contraction as gather

    monkeypatch.setattr(gather, "add_fused", wrong)
    report = fimprobe.measure(
        Words(False), torch.randint(70, (4, 5)), likelihood="categorical", draws=1
    )
    assert "replay" in report.coverage["mix.weight"]


def test_importing_fimprobe_imports_no_triton():
    code = (
        "import sys, fimprobe, fimprobe.engines.moments.contraction; print('triton' in sys.modules)"
    )
    done = run_fresh(code)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("tiles", ["some", pytest.param("all", marks=pytest.mark.long)])
def test_it_compiles_for_a_gpu(tiles, tmp_path):
    """To an H200's tensor cores, within its registers and shared memory; no GPU is needed."""
    command = [sys.executable, ROOT / "tests" / "support" / "compile_kernel.py"]
    command += ["--all"] * (tiles == "all")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    if tiles == "all":
        assert len(cases) == 5 * len(kernel.CONFIGURATIONS)
    fits = [case for case in cases if case["fits"]]
    for draws, lookup in ((1, False), (2, False), (1, True)):
        good = [c for c in fits if (c["kind"], c.get("S", 1)) == ("bf16", draws)]
        assert [c for c in good if c["tensor"] and c.get("LOOKUP", False) == lookup]
    assert [case for case in fits if case["kind"] == "fp32"]
