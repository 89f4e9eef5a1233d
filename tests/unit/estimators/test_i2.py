"""Î₂ against dense Hessians and enumerated labels: exact and sampled labels, probes and BackPACK."""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian, get_likelihood
from tests.models.cases import CASES, Lambda, lively
from tests.oracles import brute_force
from tests.support.repetitions import few_or_many, limit

pytestmark = pytest.mark.usefixtures("raw_numbers")


def bent_net(outputs=2):
    """Three layers, so that a middle layer meets curvature from both sides."""
    net = nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, outputs)
    )
    return lively(net), torch.randn(3, 3)


FAMILIES = {
    "categorical": ("categorical", lambda h: brute_force.categorical_labels(h, 1, len(h)), 3),
    "bernoulli": ("bernoulli", brute_force.bernoulli_labels, 2),
    "gaussian": (Gaussian(sigma=0.7), lambda h: brute_force.gaussian_labels(h, 0.7), 2),
    "poisson": ("poisson", brute_force.poisson_labels, 2),
}


def dense(model, args, labels):
    """``brute_force.Dense`` of every input; ``labels`` may depend on the input's number."""
    return [brute_force.Dense(model, args, b, labels) for b in range(len(args[0]))]


def mean(values):
    return sum(float(v) for v in values) / len(values)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_diagonals_equal_enumeration(name, double):
    likelihood, labels, outputs = FAMILIES[name]
    net, x = bent_net(outputs)
    truth = dense(net, (x,), labels)
    report = fimprobe.measure(
        net,
        x,
        likelihood=likelihood,
        draws="exact",
        second_order="exact",
        diagonals=True,
        bounds=False,
    )
    assert report.notes == []
    spans = brute_force.spans(net)
    assert sum(float(t.v2.sum()) for t in truth) > 1e-3
    for key, index in brute_force.groups(net).items():
        have = brute_force.group_of(report, key).i2
        per_input = torch.stack([t.fisher.diagonal()[index].sum() for t in truth])
        assert have.trace == pytest.approx(float(per_input.mean()), rel=1e-9)
        diagonal = torch.stack([t.fisher.diagonal()[index] for t in truth])
        norm = brute_force.debiased_norm(diagonal)
        assert have.norm == pytest.approx(norm, rel=1e-9) and norm > 0
        variance = mean([t.v2[index].sum() for t in truth])
        assert have.label_variance == pytest.approx(variance, rel=1e-9, abs=1e-18)
        assert have.probe_error is None
        spread = float(diagonal.var(0).sum())
        assert have.input_variance == pytest.approx(spread, rel=1e-8)
        assert have.total_variance == pytest.approx(spread + variance, rel=1e-8)
        assert have.std_error == pytest.approx(float(per_input.std()) / len(x) ** 0.5, rel=1e-8)
        # exact labels: only the inputs vary
        relative = (spread / len(x)) ** 0.5 / norm
        assert have.rel_error == pytest.approx(relative, rel=1e-7)
        if key[0] == "parameters":
            n = key[1]
            f = torch.stack([t.fisher.diagonal()[spans[n]] for t in truth]).mean(0)
            v = torch.stack([t.v2[spans[n]] for t in truth]).mean(0)
            assert torch.allclose(have.diagonal[n].flatten(), f, rtol=1e-9, atol=1e-14)
            assert torch.allclose(have.diagonal_label_variance[n].flatten(), v, rtol=1e-9, atol=1e-14)


def averages(measure, seeds, kinds, groups):
    """{(group, kind): (mean, standard error)} over seeds; ``measure(seed, plan)`` gives a report."""
    plan, seen = Plan(), {}
    for seed in range(seeds):
        report = measure(seed, plan)
        for key in groups:
            for kind in kinds:
                seen.setdefault((key, kind), []).append(
                    getattr(brute_force.group_of(report, key).i2, kind)
                )
    found = {}
    for key, values in seen.items():
        x = torch.tensor(values, dtype=torch.float64)
        found[key] = float(x.mean()), float(x.std()) / seeds**0.5
    return found


def truths(truth, groups, kinds):
    def one(t, index, kind):
        if kind == "trace":
            return t.fisher.diagonal()[index].sum()
        return t.v2[index].sum() if kind == "label_variance" else t.l2(index)

    return {
        (key, kind): mean([one(t, i, kind) for t in truth])
        for key, i in groups.items()
        for kind in kinds
    }


def agree(found, want, least, seeds=16):
    """All within few standard errors, and the errors are small enough to tell."""
    told = 0
    for key, (value, error) in found.items():
        assert abs(value - want[key]) <= limit(seeds) * error + 1e-10 * abs(want[key]) + 1e-17, (
            key,
            value,
            want[key],
            error,
        )
        told += error < 0.25 * abs(want[key])
    assert told >= least, told


@pytest.mark.parametrize("name", FAMILIES)
def test_probes_of_exact_labels_are_unbiased(name, double):
    likelihood, labels, outputs = FAMILIES[name]
    net, x = bent_net(outputs)
    groups, kinds = brute_force.groups(net), ("label_variance", "total_label_variance")
    found = averages(
        lambda seed, plan: fimprobe.measure(
            net,
            torch.cat([x] * 6),
            likelihood=likelihood,
            draws="exact",
            second_order={"probes": 4},
            estimators=("i2",),
            bounds=False,
            seed=seed,
            plan=plan,
        ),
        16,
        kinds,
        groups,
    )
    agree(found, truths(dense(net, (x,), labels), groups, kinds), 12)


@pytest.mark.parametrize(
    ("name", "label_sampling"),
    [
        pytest.param(n, how, marks=pytest.mark.long if (i + j) % 2 else ())
        for i, n in enumerate(FAMILIES)  # a family is sampled in one way by default
        for j, how in enumerate(("model", "size_biased"))
    ],
)
def test_sampled_labels_of_every_family_are_unbiased(name, label_sampling, double):
    likelihood, labels, outputs = FAMILIES[name]
    net, x = bent_net(outputs)
    groups, kinds = brute_force.groups(net), ("trace", "label_variance", "total_label_variance")
    copies = torch.cat([x] * 24)
    found = averages(
        lambda seed, plan: fimprobe.measure(
            net,
            copies,
            likelihood=likelihood,
            draws=2,
            label_sampling=label_sampling,
            estimators=("i2",),
            bounds=False,
            seed=seed,
            plan=plan,
        ),
        16,
        kinds,
        groups,
    )
    agree(found, truths(dense(net, (x,), labels), groups, kinds), len(groups))


def tokens_net():
    """A sequence model: tied embedding, a Linear used twice, two positions."""
    decode = nn.Linear(2, 3, bias=False)
    embedding = nn.Embedding(3, 2)
    decode.weight = embedding.weight

    def f(self, t):
        x = self.parts[0](t)
        x = x + self.parts[1](torch.tanh(self.parts[1](x)))
        return self.parts[2](torch.tanh(x.cumsum(1)))

    model = lively(Lambda(f, embedding, nn.Linear(2, 2), decode))
    return model, torch.tensor([[0, 2], [1, 1], [2, 1]])


NETS = ["mlp", "mlp by BackPACK", "sequence", "masked sequence"]
SAMPLINGS = [*((d, "size_biased") for d in (1, 2, 3, "exact")), *((d, "model") for d in (1, 3))]
# every net and every sampling once or twice; the other pairs are long
FREQUENT = {
    *(("mlp", 1, "size_biased"), ("mlp", 3, "model")),
    *(("mlp by BackPACK", 2, "size_biased"), ("mlp by BackPACK", 1, "model")),
    *(("sequence", "exact", "size_biased"), ("sequence", 1, "model")),
    *(("masked sequence", 3, "size_biased"), ("masked sequence", 3, "model")),
}


@pytest.mark.parametrize(
    ("name", "draws", "label_sampling"),
    [
        pytest.param(n, *s, marks=() if (n, *s) in FREQUENT else pytest.mark.long)
        for n in NETS
        for s in SAMPLINGS
    ],
)
@pytest.mark.parametrize("seeds", few_or_many(16, 60))
def test_sampled_labels_and_probes_are_unbiased(name, draws, label_sampling, seeds, double):
    """V2, the trace of F or of F − R and L2 of parameters, layers and the whole."""
    mask = None
    if name.startswith("mlp"):
        net, x = bent_net(3)
        truth = dense(net, (x,), lambda h: brute_force.categorical_labels(h, 1, 3))
    else:
        net, x = tokens_net()
        keep = torch.ones_like(x, dtype=torch.bool)
        if name == "masked sequence":
            keep[0, 1] = keep[2, 0] = False
            mask = keep.repeat(24, 1)
        truth = [
            brute_force.Dense(net, (x,), b, lambda h, b=b: masked_labels(h, keep[b]))
            for b in range(len(x))
        ]
    copies = torch.cat([x] * 24)
    groups = brute_force.groups(net)
    kinds = ("trace", "label_variance", "total_label_variance")
    found = averages(
        lambda seed, plan: fimprobe.measure(
            net,
            copies,
            likelihood="categorical",
            draws=draws,
            label_sampling=label_sampling,
            second_order="exact" if "BackPACK" in name else {"probes": 2},
            estimators=("i2",),
            mask=mask,
            bounds=False,
            seed=seed,
            plan=plan,
        ),
        seeds,
        kinds,
        groups,
    )
    agree(found, truths(truth, groups, kinds), 2 * len(groups), seeds)


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *(("categorical", 3), ("bernoulli", 1), ("poisson", 1)),
        *(
            pytest.param(n, d, marks=pytest.mark.long)
            for n, d in (("categorical", 1), ("bernoulli", 3), ("poisson", 3))
        ),
    ],
)
def test_the_residual_is_taken_off_where_labels_come_from_the_model(name, draws, double):
    """R of drawn labels has a mean that varies; size-biased and exact ones leave out what is 0."""
    likelihood, labels, outputs = FAMILIES[name]
    net, x = bent_net(outputs)
    spans, copies = brute_force.spans(net), torch.cat([x] * 48)
    truth = dense(net, (x,), labels)
    options = {"likelihood": likelihood, "diagonals": True, "estimators": ("i1", "i2", "ih")}
    options |= {"bounds": False, "second_order": {"probes": 4}}
    plan, residuals = Plan(), {n: [] for n in spans}
    for seed in range(16):
        biased, model = (
            fimprobe.measure(
                net, copies, draws=draws, label_sampling=how, seed=seed, plan=plan, **options
            )
            for how in ("size_biased", "model")
        )
        for n in spans:
            pair = biased.parameters[n], model.parameters[n]
            fisher = pair[0].ih.diagonal[n]
            assert torch.equal(pair[0].i2.diagonal[n], fisher)
            assert pair[0].i2.trace == pytest.approx(pair[0].ih.trace, rel=1e-12)
            # the same vectors make F: the rest is R
            assert torch.equal(pair[1].ih.diagonal[n], fisher)
            residuals[n].append((fisher - pair[1].i2.diagonal[n]).flatten())
            total = float(pair[1].i2.diagonal[n].sum())
            assert pair[1].i2.trace == pytest.approx(total, rel=1e-9, abs=1e-12)
    for n, span in spans.items():
        r = torch.stack(residuals[n])
        error = r.std(0) / len(r) ** 0.5
        assert bool((r.mean(0).abs() <= limit(len(r)) * error + 1e-14).all()), n
        # its variance is V2 of the inputs over draws, and that of the probes of ‖·‖ = R_ii
        least = torch.stack([t.v2[span] for t in truth]).mean(0) / (len(copies) * draws)
        if n.startswith("4"):  # h is linear in the last layer
            assert float(r.abs().max()) == 0 == float(least.max())
        else:
            assert float(r.var(0).sum()) > 0.7 * float(least.sum()) > 0
    exact = fimprobe.measure(net, copies, draws="exact", **options)
    for n in spans:
        assert torch.equal(exact.parameters[n].i2.diagonal[n], exact.parameters[n].i1.diagonal[n])


@pytest.mark.parametrize("label_sampling", ["size_biased", "model"])
def test_the_standard_error_of_i2_is_that_of_its_own_vectors(label_sampling, double):
    """Inputs drawn anew: the spread of the traces over the errors that each told."""
    net, _ = bent_net(3)
    torch.manual_seed(5)
    pool, plan = torch.randn(400, 3), Plan()
    found = []
    for seed in range(100):
        rows = torch.randint(len(pool), (40,))
        report = fimprobe.measure(
            net,
            pool[rows],
            likelihood="categorical",
            draws=1,
            label_sampling=label_sampling,
            estimators=("i2",),
            bounds=False,
            seed=seed,
            plan=plan,
        )
        for where in ("0", "2", "4", "total"):
            e = (report.total if where == "total" else report.layers[where]).i2
            found.append((where, e.trace, e.std_error))
    for where in ("0", "2", "4", "total"):
        trace, error = torch.tensor([(t, e) for w, t, e in found if w == where]).T
        ratio = float(error.square().mean().sqrt() / trace.std())
        assert 0.8 < ratio < 1.25, (where, ratio)


def masked_labels(h, keep):
    """Labellings of the kept positions, their scores zero elsewhere."""
    h = h.view(len(keep), -1)
    for w, d in brute_force.categorical_labels(h[keep].flatten(), int(keep.sum()), h.shape[1]):
        full = torch.zeros_like(h)
        full[keep] = d.view(-1, h.shape[1])
        yield w, full.flatten()


@pytest.mark.parametrize("name", FAMILIES)
def test_minus_hessian_is_fisher_minus_residual(name, double):
    """−∂²log p(y|x,θ)/∂θ∂θᵀ = F − R with R made of the package's own scores; means over y too."""
    likelihood, labels, outputs = FAMILIES[name]
    net, x = bent_net(outputs)
    family = get_likelihood(likelihood)
    (truth,) = dense(net, (x[:1],), labels)
    h = net(x[:1]).detach()
    distribution = {
        "categorical": lambda h: torch.distributions.Categorical(logits=h),
        "bernoulli": lambda h: torch.distributions.Bernoulli(logits=h),
        "gaussian": lambda h: torch.distributions.Normal(h, 0.7),
        "poisson": lambda h: torch.distributions.Poisson(h.exp()),
    }[name]
    names = [n for n, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(theta, y):
        parts = dict(zip(names, theta.split(sizes), strict=True))
        parts = {n: v.view_as(net.get_parameter(n)) for n, v in parts.items()}
        out = torch.func.functional_call(net, parts, (x[:1],))
        return -distribution(out).log_prob(y).sum()

    largest = 0.0
    for u in (0.1, 0.5, 0.9):
        y = family.quantile(h, torch.full(family.label_shape(h), u))
        minus = torch.autograd.functional.hessian(lambda t, y=y: loss(t, y), flat)
        residual = brute_force.hessians(net, (x[:1],), [family.score(h, y)])[0, 0]
        assert torch.allclose(minus, truth.fisher - residual, rtol=1e-9, atol=1e-12)
        largest = max(largest, float(residual.abs().max()))
    assert largest > 1e-3
    expected = truth.weights @ truth.scores
    assert float(expected.abs().max()) < 1e-9  # hence E R = 0


PIECEWISE = {
    "relu mlp": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)),
        torch.randn(3, 4),
    ),
    "leaky cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
            nn.LeakyReLU(),
            nn.Linear(3, 3),
        ),
        torch.randn(3, 1, 5, 5),
    ),
}


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_nets_have_exact_zeros(name, draws, double):
    """Within layers H is zero; between layers it is not."""
    net, x = PIECEWISE[name]()
    lively(net)
    truth = dense(net, (x,), lambda h: brute_force.categorical_labels(h, 1, 3))
    whole = brute_force.groups(net)["total", ""]
    want = mean([t.l2(whole) for t in truth])
    assert want > 1e-2
    plan, seen, copies = Plan(), [], torch.cat([x] * 6)
    for seed in range(16):
        report = fimprobe.measure(
            net, copies, likelihood="categorical", draws=draws, bounds=False, seed=seed, plan=plan
        )
        for group in [*report.parameters.values(), *report.layers.values()]:
            assert (group.i2.label_variance, group.i2.total_label_variance) == (0.0, 0.0)
            assert group.i2.probe_error == 0.0
        assert report.total.i2.label_variance == 0.0
        seen.append(report.total.i2.total_label_variance)
    seen = torch.tensor(seen)
    assert float(seen.min()) > 0
    error = float(seen.std()) / len(seen) ** 0.5
    assert abs(float(seen.mean()) - want) <= limit(16) * error and error < 0.2 * want


PROBES = {"second_order": {"probes": 2}}


@pytest.mark.parametrize("name", ["mlp", "gru", "conv2d", "class token", "layer norm"])
def test_the_last_layer_has_no_label_variance(name, double):
    case = CASES[name]()
    options = {"likelihood": "categorical", "bounds": False, **PROBES}
    report = fimprobe.measure(case.model.eval(), case.inputs, **options)
    *_, last = report.layers
    assert report.layers[last].i2.label_variance == 0.0
    assert report.layers[last].i2.total_label_variance == 0.0
    assert report.layers[last].i1.label_variance > 0
    first = next(iter(report.parameters.values())).i2
    assert first.label_variance != 0.0 and first.total_label_variance != 0.0


KINDS = (
    "trace",
    "label_variance",
    "total_label_variance",
    "std_error",
    "probe_error",
    "input_variance",
)


CHUNKED = ["mlp", "conv2d", "attention net", "lstm", "class token", "bag mean", "tied and reused"]


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *((n, 2) for n in CHUNKED),
        *(pytest.param(n, 1, marks=pytest.mark.long) for n in CHUNKED if n != "mlp"),
        *(("mlp", 1), ("mlp", "exact"), ("gru", "exact")),
    ],
)
def test_chunks_draw_the_same_labels_and_probes(name, draws, double):
    case = CASES[name]()
    options = {"likelihood": "categorical", "draws": draws, "diagonals": True, "seed": 5} | PROBES
    plan, reports = Plan(), []
    for chunk in (None, 1, 2):  # the first measurement makes the plan
        plan.chunk_size = chunk
        reports.append(
            fimprobe.measure(case.model.eval(), case.inputs, plan=plan, bounds=False, **options)
        )
    whole, *in_chunks = reports
    largest = abs(whole.total.i2.total_label_variance) + abs(whole.total.i2.label_variance)
    for other in in_chunks:
        for n, group in [*whole.parameters.items(), ("", whole.total)]:
            have = (other.parameters[n] if n else other.total).i2
            for kind in KINDS:
                want = getattr(group.i2, kind)
                same = None if want is None else pytest.approx(want, rel=1e-9, abs=1e-12 * largest)
                assert getattr(have, kind) == same, (n, kind)
            for kind in ("diagonal", "diagonal_label_variance"):
                for key, want in getattr(group.i2, kind).items():
                    assert torch.allclose(
                        getattr(have, kind)[key], want, rtol=1e-9, atol=1e-12 * largest
                    )


@pytest.mark.parametrize("memory_mb", [0.02, 0.01])
def test_little_memory_changes_nothing(memory_mb, double):
    case = CASES["attention net"]()
    options = {"likelihood": "categorical", "draws": 2, "seed": 1} | PROBES
    want = fimprobe.measure(case.model.eval(), case.inputs, **options)
    plan = Plan()
    have = fimprobe.measure(case.model, case.inputs, memory_mb=memory_mb, plan=plan, **options)
    assert plan.chunk_size is not None and plan.chunk_size < len(case.inputs[0])
    for n, group in want.parameters.items():
        for kind in KINDS:
            assert getattr(have.parameters[n].i2, kind) == pytest.approx(
                getattr(group.i2, kind), rel=1e-9, abs=1e-14
            )


@pytest.mark.parametrize("draws", [1, 3, "exact"])
def test_bounds_change_no_estimate(draws, double):
    """Their seeds ride along in the same R: they must not enter the labels' sums."""
    case = CASES["attention net"]()
    options = {"likelihood": "categorical", "draws": draws, "diagonals": True} | PROBES
    with_bounds, without = (
        fimprobe.measure(case.model.eval(), case.inputs, bounds=b, **options) for b in (True, False)
    )
    assert with_bounds.total.i2.bound is not None and without.total.i2.bound is None
    for n, group in [*without.parameters.items(), ("", without.total)]:
        have = (with_bounds.parameters[n] if n else with_bounds.total).i2
        for kind in KINDS:
            want = getattr(group.i2, kind)
            assert getattr(have, kind) == (want if want is None else pytest.approx(want, rel=1e-12))
        for key, want in group.i2.diagonal_label_variance.items():
            assert torch.allclose(have.diagonal_label_variance[key], want, rtol=1e-12, atol=1e-18)


FLOATS = ["mlp", "conv2d", "attention net", "lstm", "class token", "layer norm"]


@pytest.mark.parametrize(
    ("name", "draws"), [*((n, 2) for n in FLOATS), ("mlp", "exact"), ("conv2d", "exact")]
)
def test_float32_agrees_with_float64(name, draws, double):
    case = CASES[name]()
    model = case.model.eval()
    options = {"likelihood": "categorical", "draws": draws, "bounds": False} | PROBES
    want = fimprobe.measure(model, case.inputs, **options)
    inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs)
    have = fimprobe.measure(copy.deepcopy(model).float(), inputs, **options)
    for kind in ("trace", "label_variance", "total_label_variance", "probe_error"):
        largest = max(abs(getattr(g.i2, kind)) for g in want.parameters.values())
        for n, group in want.parameters.items():
            assert getattr(have.parameters[n].i2, kind) == pytest.approx(
                getattr(group.i2, kind), rel=1e-3, abs=1e-4 * largest
            ), (n, kind)
