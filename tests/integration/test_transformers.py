"""transformers' models in every parameter, against plain autograd on single samples in float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fimprobe
from fimprobe.engines.autograd.curvature_verification import check_curvature
from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.engines.problem.problem import Problem
from fimprobe.likelihoods import Categorical, Gaussian
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin
from fimprobe.training.likelihood_inference.transformers_heads import label_mask
from tests.models.cases import Lambda
from tests.models.transformers_cases import (
    CLASSES,
    LENGTH,
    MODELS,
    SIZE,
    Sample,
    decoder,
    encoder,
    gpt2,
    images,
    lively,
    padded,
    vit,
)
from tests.oracles import brute_force
from tests.support.curvature import Seeded, TooFew, orthogonal_measurement, problem_of, seeds_of

DRAWS = 3


class Double:
    """The name ``torch`` in a modelling file: what it raises to float32 stays in float64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@pytest.fixture
def exact(monkeypatch, double):
    """float64 throughout: norms, softmaxes and routers of these models compute in float32."""
    raised = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else raised(x))

    def make(name):
        sample = MODELS[name]() if isinstance(name, str) else name()
        for path in {type(m).__module__ for m in sample.model.modules()}:
            if path.startswith("transformers."):
                monkeypatch.setattr(sys.modules[path], "torch", Double())
        return lively(sample.model), sample.inputs

    return make


def question(model, inputs, **options):
    mask = label_mask(model, (), inputs)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if mask is not None and mask.shape != getattr(ids, "shape", None):
        mask = None
    return Problem(
        twin=make_twin(model),
        batch=Batch.of(inputs),
        likelihood=Categorical(),
        draws=Draws(count=DRAWS, seed=5),
        select_outputs=select_outputs,
        mask=mask,
        memory_mb=512,
        diagonals=True,
        **options,
    )


def single(inputs, b):
    return {k: x[b : b + 1] for k, x in inputs.items()}


def scores(model, inputs, problem):
    """{name: [B, S, *shape]} of log p of the drawn labels, one sample and one draw at a time."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: [] for n in named}
    with torch.no_grad():
        shape = model(**inputs).logits.shape[:-1]
    uniforms = problem.draws.uniforms_for(slice(0, SIZE), SIZE, shape)
    for b in range(SIZE):
        h = model(**single(inputs, b)).logits
        for s in range(DRAWS):
            labels = Categorical().quantile(h.detach(), uniforms[b : b + 1, s])
            if problem.mask is not None:
                labels = labels.masked_fill(~problem.mask[b : b + 1], -100)
            log = -F.cross_entropy(h.flatten(0, -2), labels.flatten(), reduction="sum")
            gs = torch.autograd.grad(log, list(named.values()), retain_graph=True, allow_unused=True)
            for (n, p), g in zip(named.items(), gs, strict=True):
                found[n].append(torch.zeros_like(p) if g is None else g)
    return {n: torch.stack(gs).unflatten(0, (SIZE, DRAWS)) for n, gs in found.items()}


def close(have, want, scale=None, rtol=1e-8):
    """Equal within ``rtol`` of the largest entry, and of ``scale`` where that vanishes."""
    have, want = torch.as_tensor(have), torch.as_tensor(want)
    assert have.shape == want.shape
    bound = rtol * (want.abs().max() if scale is None else scale)
    assert ((have - want).abs() <= bound).all(), (have - want).abs().max() / want.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_drawn_labels_equal_those_of_single_samples(name, exact):
    model, inputs = exact(name)
    problem = question(model, inputs)
    plan = make_verified_plan(problem)
    measured = measure_with_fallbacks(problem, plan).moments["i1"]
    g = scores(model, inputs, problem)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(measured.coverage) == trainable
    left_out = {n for n, how in measured.coverage.items() if how.startswith("left out")}
    assert set(measured.parameters) == trainable - left_out
    assert len(left_out) < len(trainable) / 4
    largest = max(float(x.square().flatten(2).sum(2).max()) for x in g.values())
    for n in trainable:
        norms = g[n].square().flatten(2).sum(2)
        if n in left_out:
            assert float(norms.max()) == 0, n
            continue
        have = measured.parameters[n]
        # gradients that are zero but for rounding (keys' biases) are compared with the largest
        floor = 1e-20 * largest
        a2, a4, q = g[n].square().sum((0, 1)), g[n].pow(4).sum((0, 1)), g[n].square().sum(1)
        q = q.square().sum(0)
        close(have.squared_norms, norms, max(float(norms.max()), floor / 1e-8))
        close(have.a2, a2, max(float(a2.max()), floor / 1e-8))
        close(have.a4, a4, max(float(a4.max()), floor * largest / 1e-8))
        close(have.q, q, max(float(q.max()), floor * largest / 1e-8))


FEW = ["BERT eager", "DistilBERT", "RoBERTa", "ViT", "ResNet", "ConvNeXt"]


@pytest.mark.parametrize("name", FEW)
def test_exact_labels_equal_enumeration(name, exact):
    model, inputs = exact(name)
    model = model.requires_grad_(True)
    positions = LENGTH if name == "RoBERTa" else 1
    args = tuple(inputs.values())
    oracle = brute_force.enumerate_fisher(
        model,
        args,
        lambda h: brute_force.categorical_labels(h, positions, CLASSES),
        pick=lambda out: out.logits,
    )
    report = fimprobe.measure(
        model,
        inputs,
        likelihood="categorical",
        draws="exact",
        diagonals=True,
        estimators=("i1",),
        bounds=False,
    )
    whole = brute_force.summarise(*oracle, "")
    top = float(whole["diagonal"].max())
    for n, group in report.parameters.items():
        want = brute_force.summarise(*oracle, n)
        close(
            group.i1.diagonal[n].flatten(), want["diagonal"], max(1e-12 * top, want["diagonal"].max())
        )
        variance = want["label"]
        close(
            group.i1.diagonal_label_variance[n].flatten(),
            variance,
            max(1e-12 * top**2, float(variance.abs().max())),
        )
    close(report.total.i1.total_label_variance, whole["l1"])


def positional(model, inputs):
    """The model with its keyword inputs in order, for the oracle."""
    names = list(inputs)

    def call(self, *args):
        return self.parts[0](**dict(zip(names, args, strict=True))).logits

    return Lambda(call, model), tuple(inputs.values())


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_equal_double_backward(name, exact):
    model, inputs = exact(name)
    problem = problem_of(model, inputs, likelihood=Gaussian(), draws=1)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    called, args = positional(model, inputs)
    bent = brute_force.bent(called, args, seeds_of(problem), u)[:, 0]
    largest = float(bent.square().sum(1).max())
    assert largest > 1e-6
    for n, span in brute_force.spans(problem.twin).items():
        want = bent[:, span].square().sum(1)
        if n in measured.curvature.parameters:
            have = measured.curvature.parameters[n].whole[0, :, 0]
            close(have, want, max(float(want.max()), 1e-12 * largest))
        else:
            assert float(want.max()) == 0, n


def diagonals(model, inputs, seeds):
    """∂²/∂θ_i² of Σ_a seed_a h_a, {name: [B, seeds, numel]}, by double backward of unit vectors."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: [] for n in named}
    for b in range(SIZE):
        for seed in seeds:
            with sdpa_kernel(SDPBackend.MATH):
                h = model(**single(inputs, b)).logits
            params = list(named.values())
            gs = torch.autograd.grad(h, params, seed[b : b + 1], create_graph=True, allow_unused=True)
            for n, p, g in zip(named, params, gs, strict=True):
                if g is None or not g.requires_grad:
                    found[n].append(torch.zeros(p.numel()))
                    continue
                units = torch.eye(p.numel()).view(-1, *p.shape)
                (rows,) = torch.autograd.grad(
                    g, p, units, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
                none = torch.zeros(p.numel())
                found[n].append(none if rows is None else rows.flatten(1).diagonal().clone())
    return {n: torch.stack(x).unflatten(0, (SIZE, len(seeds))) for n, x in found.items()}


class One(Seeded):
    """One dense seed in place of labels."""

    def exact_passes(self, outputs, mask):
        first = next(super().exact_passes(outputs, mask))
        yield first._replace(square=first.square * 2, quartic=first.quartic * 2)

    hutchinson_passes = exact_passes

    def count_passes(self, outputs):
        return 1


SMALL = {
    "GPT-2": lambda: gpt2(n_layer=1),
    "Llama": lambda: decoder("Llama", num_hidden_layers=1, hidden_size=4, head_dim=2),
    "BERT": lambda: encoder("Bert", "ForSequenceClassification", num_hidden_layers=1),
    "ViT": vit,
}


def often(*names):
    """The names of ``SMALL``, of which all but these are run by ``-m long`` only."""
    return [pytest.param(n, marks=[] if n in names else [pytest.mark.long]) for n in SMALL]


def small_sample(name):
    """A model of ``SMALL`` with its inputs."""
    return Sample(SMALL[name](), images() if name == "ViT" else padded())


@pytest.mark.parametrize("name", often("Llama", "BERT"))
def test_probed_second_derivatives_are_unbiased(name, exact):
    """Σ_i R_ii and Σ_i R_ii² of every parameter: means over seeds of two probes each."""
    model, inputs = exact(lambda: small_sample(name))
    runs, plan = {}, None
    for seed in range(40):
        problem = problem_of(model, inputs, likelihood=One(), probes=2, seed=seed)
        plan = plan or make_verified_plan(problem)
        for n, c in measure_with_fallbacks(problem, plan).curvature.parameters.items():
            squares = 0 if c.probe_squares is None else c.probe_squares.mean(2)
            means = torch.stack([c.trace, c.square, squares + torch.zeros_like(c.square)])
            runs.setdefault(n, []).append(means.sum((1, 2)))
    diagonal = diagonals(model, inputs, seeds_of(problem))
    biased = 0
    for n, x in runs.items():
        have = torch.stack(x)
        truth = torch.stack([diagonal[n].sum(), diagonal[n].square().sum()])
        off, error = (have.mean(0)[:2] - truth).abs(), have.std(0) / len(have) ** 0.5
        scale = torch.stack([diagonal[n].abs().sum(), truth[1]])
        assert (off <= 4 * error[:2] + 1e-9 * scale + 1e-12).all(), (n, off / error[:2])
        biased += bool(have.mean(0)[2] - truth[1] > 4 * error[2])
    assert biased > 4  # one probe's own squares would have been told apart


@pytest.mark.parametrize("name", often("GPT-2", "ViT"))
def test_probes_at_all_outputs_together_give_the_diagonal(name, exact, monkeypatch):
    """Random signs replaced by the rows of a Hadamard matrix: their mean is R's diagonal itself."""
    model, inputs = exact(lambda: small_sample(name))
    for probes in (256, 512, 1024):
        # of drawn labels the blocks are measured along one direction, however many probes there are
        problem = problem_of(model, inputs, likelihood=Gaussian(), draws=1, probes=probes)
        try:
            found = orthogonal_measurement(monkeypatch, problem, diagonal=probes)
            break
        except TooFew:
            continue
    diagonal = diagonals(model, inputs, seeds_of(problem))
    largest = max(float(d.sum(2).abs().max()) for d in diagonal.values())
    for n, want in diagonal.items():
        if n in found.parameters:
            close(
                found.parameters[n].trace, want.sum(2), max(largest * 1e-3, want.sum(2).abs().max())
            )


@pytest.mark.parametrize("name", ["Llama eager", "Mamba", "Qwen2 MoE"])
def test_a_float64_model_that_computes_in_float32_is_measured(name, double):
    """The guards compare as closely as the coarsest type inside allows."""
    sample = MODELS[name]()
    model = lively(sample.model).double()
    problem = problem_of(model, sample.inputs, likelihood=Gaussian(), draws=1)
    plan = make_verified_plan(problem)
    measured = measure_with_fallbacks(problem, plan)
    check_curvature(problem, plan)
    assert measured.notes == [] and plan.curvature_failure == ""
    called, args = positional(model, sample.inputs)
    seeds = seeds_of(problem)
    spans = brute_force.spans(problem.twin)
    total = sum(p.squared_norms for p in measured.moments["i1"].parameters.values())
    want = torch.stack(
        [
            brute_force._score(called, args, b, seeds[0], lambda h: h).square().sum()
            for b in range(SIZE)
        ]
    )
    close(total[:, 0], want, rtol=1e-5)
    assert set(measured.curvature.parameters) == set(spans)


WIDE = """
import gc, threading, time, torch, fimprobe
from fimprobe.torchvision_compat import hide_broken_torchvision
hide_broken_torchvision()
import transformers
torch.set_num_threads(1)
config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50257, n_positions=16)
model = transformers.GPT2LMHeadModel(config)
x = torch.randint(50257, (4, 16))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

model(input_ids=x[:1, :4], labels=x[:1, :4]).loss.backward()
only = {"estimators": ("i1",), "bounds": False}
for options in ({}, only):  # what is imported on the way is no memory of the measurement
    fimprobe.measure(model, {"input_ids": x[:1, :4]}, likelihood="categorical", **options)
gc.collect()
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
report = fimprobe.measure(model, {"input_ids": x}, likelihood="categorical", memory_mb=64, **only)
done = True
thread.join()
assert report.notes == []
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_vocabulary_stays_below_the_ceiling():
    """50,257 tokens: 13 MB of float32 outputs, and float64 while drawing labels.

    glibc's heap keeps freed tensors below 32 MB unless told otherwise: here it is told, so that what
    is resident is what is held.
    """
    told = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, "-c", WIDE],
        env={**os.environ, **told, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 10 < float(done.stdout.split()[-1]) < 64
