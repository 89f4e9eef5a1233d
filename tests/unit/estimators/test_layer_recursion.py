"""Layer recursion (19), Î₁ of hidden activations, and ‖∂h_L/∂W‖, against matrices made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian
from tests.models.cases import Lambda, lively
from tests.oracles import brute_force, dense
from tests.support.repetitions import limit

pytestmark = pytest.mark.usefixtures("raw_numbers")

CATEGORICAL = "categorical", dense.categorical(1, 3)
BERNOULLI = "bernoulli", brute_force.bernoulli_labels
POISSON = "poisson", lambda h: brute_force.poisson_labels(h, 30)
GAUSSIAN = Gaussian(0.7), lambda h: brute_force.gaussian_labels(h, 0.7)


# -- the recursion itself, written out for a chain of Linear layers --------------------------------


def chain(outputs, bias=True):
    widths = [2, 3, 4, outputs]
    layers = [nn.Linear(a, b, bias=bias) for a, b in zip(widths, widths[1:], strict=False)]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Softplus(), layers[2])
    return lively(net), layers


def recursion(layers, x):
    """Per layer h_l, h̄_l, W_l⁻, and from the last one back B_{l+1} D_l and B_l = B_{l+1} D_l W_l⁻."""
    slopes = [lambda z: 1 - z.tanh().square(), torch.sigmoid, torch.ones_like]
    bends = [torch.tanh, F.softplus, lambda z: z]
    h, hidden, diagonals = x, [], []
    for layer, slope, bend in zip(layers, slopes, bends, strict=True):
        z = layer.weight.detach() @ h + (0 if layer.bias is None else layer.bias.detach())
        hidden.append(h)
        diagonals.append(torch.diag(slope(z)))
        h = bend(z)
    found, behind = [], torch.eye(len(h))
    for layer, h_l, d in zip(layers[::-1], hidden[::-1], diagonals[::-1], strict=True):
        bar = h_l if layer.bias is None else torch.cat([h_l, torch.ones(1)])
        found.append(
            (h_l, bar, layer.weight.detach(), behind @ d, behind @ d @ layer.weight.detach())
        )
        behind = found[-1][-1]
    return found[::-1], h


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("family", "outputs"), [(CATEGORICAL, 3), (BERNOULLI, 2), (POISSON, 2), (GAUSSIAN, 2)]
)
def test_recursion_19(family, outputs, bias, double):
    """∂ℓ/∂W_l = D_l (∂ℓ/∂h_{l+1}) h̄_lᵀ; Î₁(h_l) = B_lᵀ I(h_L) B_l; (20), (21) are their norms."""
    likelihood, labels = family
    net, layers = chain(outputs, bias)
    x = torch.randn(3, 2)
    report = fimprobe.measure(net, x, likelihood=likelihood, draws="exact", estimators=("i1",))
    paths = ["0", "2", "4"]
    assert list(report.layers) == paths
    want = {p: [] for p in paths}
    for b in range(3):
        links, h = recursion(layers, x[b])
        w, d = (torch.stack(v) for v in zip(*labels(h), strict=True))
        for path, (_, bar, _, front, back) in zip(paths, links, strict=True):
            g = torch.einsum("yo,i->yoi", d @ front, bar)  # ∂ℓ/∂W_l
            inner = d @ back  # ∂ℓ/∂h_l
            fisher = (inner * w[:, None]).T @ inner
            want[path].append(
                {
                    "trace": w @ g.square().sum((1, 2)),
                    "variance": ((w @ g.pow(4).flatten(1)) - (w @ g.flatten(1).square()) ** 2).sum(),
                    "hidden": fisher.trace(),
                    "hidden variance": (w @ inner.pow(4) - fisher.diagonal().square()).sum(),
                    "norm": front.norm() * bar.norm(),
                    "top": torch.linalg.matrix_norm(front, 2) * bar.norm(),
                }
            )
    for path in paths:
        group, rows = report.layers[path], want[path]

        def mean(kind, power=1, rows=rows):
            return pytest.approx(dense.mean(r[kind] ** power for r in rows), rel=1e-9)

        assert group.i1.trace == mean("trace")
        assert group.i1.label_variance == mean("variance")
        assert group.geometry.jacobian_norm**2 == mean("norm", 2)
        assert group.geometry.jacobian_spectral_norm**2 == mean("top", 2)
        if path == "0":
            assert group.activation is None
        else:
            assert group.activation.trace == mean("hidden")
            assert group.activation.label_variance == mean("hidden variance")


@pytest.mark.parametrize("bias", [True, False])
def test_weight_bounds_of_the_report(bias, double):
    """(20) and (21) beside what they bound: root mean squares over the inputs, by hand."""
    net, layers = chain(3, bias)
    x = torch.randn(4, 2)
    report = fimprobe.measure(net, x, likelihood="categorical", draws="exact", estimators=("i1",))
    widths = [len(layer.weight) for layer in layers]
    tops = [torch.linalg.matrix_norm(layer.weight.detach(), 2) for layer in layers]
    whole = [layer.weight.detach().norm() for layer in layers]
    for i, path in enumerate(["0", "2", "4"]):
        geometry = report.layers[path].geometry
        after = range(i + 1, 3)
        product = torch.stack([torch.ones(()), *[tops[j] for j in after]]).prod()
        options = [min(widths[i:]) ** 0.5 * product]
        options += [whole[j] * product / tops[j] for j in after]
        size = dense.mean(recursion(layers, row)[0][i][1].square().sum() for row in x) ** 0.5
        assert geometry.spectral_bound == pytest.approx(float(product) * size, rel=1e-5)
        assert geometry.frobenius_bound == pytest.approx(float(min(options)) * size, rel=1e-5)
        assert geometry.jacobian_norm <= geometry.frobenius_bound
        assert geometry.jacobian_spectral_norm <= geometry.spectral_bound
        assert geometry.weight_spectral_norm == pytest.approx(float(tops[i]), rel=1e-5)
        assert geometry.weight_frobenius_norm == pytest.approx(float(whole[i]), rel=1e-9)
        assert geometry.reason == ""


# -- any network: ∂h_L/∂h_l of the tensor that enters a layer, one row at a time -------------------


def conv():
    net = nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Conv1d(2, 3, 2, padding=1), nn.GELU())
    net += nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return lively(net), torch.randn(3, 2, 4), 1


def sequence():
    """Positions see each other, and each has its own label."""
    net = Lambda(
        lambda self, x: self.parts[2](torch.tanh(self.parts[1](self.parts[0](x).sin().cumsum(1)))),
        nn.Linear(2, 3),
        nn.Linear(3, 2),
        nn.Linear(2, 3),
    )
    return lively(net), torch.randn(3, 2, 2), 2


def time_major():
    def f(self, x):
        y = torch.tanh(self.parts[0](x.transpose(0, 1)))
        return self.parts[2](torch.tanh(self.parts[1](y)).sum(0))

    net = Lambda(f, nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    return lively(net), torch.randn(3, 5, 2), 1


def folded():
    def f(self, x):
        y = torch.tanh(self.parts[1](torch.tanh(self.parts[0](x.flatten(0, 1)))))
        return self.parts[2](y.unflatten(0, x.shape[:2]).sum(1))

    net = Lambda(f, nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 3))
    return lively(net), torch.randn(3, 2, 2), 1


def residual():
    """h reaches the outputs through a layer and past it; one layer is used twice."""

    def f(self, x):
        h = torch.tanh(self.parts[0](x))
        h = h + self.parts[1](torch.tanh(self.parts[1](h)))
        return self.parts[2](h)

    net = Lambda(f, nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False))
    return lively(net), torch.randn(3, 2), 1


def norms():
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return lively(net), torch.randint(5, (3, 2)), 1


NETS = {
    "mlp": lambda: (chain(3)[0], torch.randn(4, 2), 1),
    "conv": conv,
    "sequence": sequence,
    "time major": time_major,
    "folded": folded,
    "residual": residual,
    "norms": norms,
}


def hidden_jacobians(net, x, b):
    """{path: ∂h_L/∂(the first tensor that enters it) [n_outputs, numel]}, and the outputs."""
    seen, handles = {}, []

    def keep(path):
        def hook(module, args):
            seen.setdefault(path, args[0])

        return hook

    for path, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(keep(path)))
    try:
        h = net(x[b : b + 1]).flatten()
    finally:
        for handle in handles:
            handle.remove()
    wanted = {p: z for p, z in seen.items() if z.requires_grad}
    rows = [torch.autograd.grad(one, list(wanted.values()), retain_graph=True) for one in h]
    found = {p: torch.stack([r[i].flatten() for r in rows]) for i, p in enumerate(wanted)}
    return found, h.detach()


def labels_of(likelihood, positions):
    if likelihood == "categorical":
        return dense.categorical(positions, 3)
    return brute_force.bernoulli_labels if likelihood == "bernoulli" else GAUSSIAN[1]


def truths(net, x, labels):
    """{path: per input (diag F, its label variance, L1) of ∂ℓ/∂h_l}, by enumeration."""
    found = {}
    for b in range(len(x)):
        jacobians, h = hidden_jacobians(net, x, b)
        w, d = (torch.stack(v) for v in zip(*labels(h), strict=True))
        for path, j in jacobians.items():
            g = d @ j
            f = w @ g.square()
            fisher = (g * w[:, None]).T @ g
            l1 = w @ g.square().sum(1).square() - fisher.square().sum()
            found.setdefault(path, []).append((f, w @ g.pow(4) - f.square(), l1))
    return {p: [torch.stack(c) for c in zip(*rows, strict=True)] for p, rows in found.items()}


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("name", NETS)
def test_activations_of_exact_labels(name, likelihood, double):
    net, x, positions = NETS[name]()
    truth = truths(net, x, labels_of(likelihood, positions))
    options = {"likelihood": likelihood, "draws": "exact", "estimators": ("i1",)}
    report, plan = fimprobe.measure(net, x, **options), Plan()
    fimprobe.measure(net, x, plan=plan, **options)
    plan.chunk_size = 2
    in_chunks = fimprobe.measure(net, x, plan=plan, **options)
    have = {p for p, g in report.layers.items() if g.activation is not None}
    assert have == set(truth) and len(have) >= 1
    assert all(g.activation is None for g in [*report.parameters.values(), report.total])
    assert len(have) < len(report.layers) and set(report.layers) - have == {next(iter(report.layers))}
    size = len(x)
    for path, (f, v, l1) in truth.items():
        for e in (report.layers[path].activation, in_chunks.layers[path].activation):
            trace, spread = f.sum(1), f.var(0).sum()
            assert e.trace == pytest.approx(float(trace.mean()), rel=1e-9)
            norm = brute_force.debiased_norm(f)
            assert e.norm == pytest.approx(norm, rel=1e-9) and norm > 0
            assert e.label_variance == pytest.approx(float(v.sum(1).mean()), rel=1e-8)
            assert e.input_variance == pytest.approx(float(spread), rel=1e-8)
            total = float(spread + v.sum(1).mean())
            assert e.total_variance == pytest.approx(total, rel=1e-8)
            assert e.std_error == pytest.approx(float(trace.std()) / size**0.5, rel=1e-8)
            relative = float((spread / size).sqrt()) / norm
            assert e.rel_error == pytest.approx(relative, rel=1e-8)
            assert e.total_label_variance == pytest.approx(float(l1.mean()), rel=1e-8)
            assert e.diagonal is None and e.bound is None


@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize("name", ["mlp", "conv", "sequence", "time major"])
def test_activations_of_drawn_labels_are_unbiased(name, draws, double):
    net, x, positions = NETS[name]()
    truth = truths(net, x, labels_of("categorical", positions))
    copies, plan, seen, seeds = 60, Plan(), {}, 16
    kinds = ("trace", "label_variance", "input_variance", "total_variance", "total_label_variance")
    for seed in range(seeds):
        report = fimprobe.measure(
            net,
            x.repeat(copies, *[1] * (x.dim() - 1)),
            likelihood="categorical",
            draws=draws,
            estimators=("i1",),
            seed=seed,
            plan=plan,
        )
        for path in truth:
            e = report.layers[path].activation
            for kind in kinds:
                seen.setdefault((path, kind), []).append(getattr(e, kind))
    for path, (f, v, l1) in truth.items():
        across = f.repeat(copies, 1).var(0).sum()
        want = {
            "trace": f.sum(1).mean(),
            "label_variance": v.sum(1).mean(),
            "input_variance": across,
            "total_variance": across + v.sum(1).mean(),
            "total_label_variance": l1.mean(),
        }
        for kind, value in want.items():
            if draws == 1 and kind not in ("trace", "total_variance"):
                assert set(seen[path, kind]) == {None}
                continue
            have = torch.tensor(seen[path, kind])
            error = float(have.std()) / seeds**0.5
            assert abs(float(have.mean()) - float(value)) < limit(seeds) * error, (path, kind)
            assert error < 0.2 * float(value) or kind == "input_variance", (path, kind)


def test_activations_belong_to_the_bounds(double):
    net, x, _ = NETS["mlp"]()
    report = fimprobe.measure(net, x, likelihood="categorical", bounds=False, estimators=("i1",))
    assert all(g.activation is None and g.geometry is None for g in report.layers.values())


# -- ‖∂h_L/∂W‖ of parameters, layers and the whole -------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_jacobian_norms_of_exact_labels(name, double):
    """Root mean squares over the inputs; the outputs' norms need no label, whatever the family."""
    net, x, _ = NETS[name]()
    js = [torch.cat(list(brute_force.jacobian(net, (x,), b)[0].values()), 1) for b in range(len(x))]
    for likelihood in ("categorical", "bernoulli", Gaussian(0.3)):
        report = fimprobe.measure(net, x, likelihood=likelihood, draws="exact", estimators=("i1",))
        for key, index in brute_force.groups(net).items():
            geometry = brute_force.group_of(report, key).geometry
            norm = dense.mean(j[:, index].square().sum() for j in js) ** 0.5
            top = dense.mean(torch.linalg.matrix_norm(j[:, index], 2) ** 2 for j in js) ** 0.5
            assert geometry.jacobian_norm == pytest.approx(norm, rel=1e-10), key
            assert geometry.jacobian_spectral_norm == pytest.approx(top, rel=1e-10), key
            if key[0] != "layers":  # (20) and (21) are statements on layers
                assert geometry.spectral_bound is None and geometry.frobenius_bound is None


@pytest.mark.parametrize("name", ["conv", "sequence"])
def test_jacobian_norms_of_drawn_labels_are_unbiased(name, double):
    net, x, _ = NETS[name]()
    js = [torch.cat(list(brute_force.jacobian(net, (x,), b)[0].values()), 1) for b in range(len(x))]
    groups, plan, seen, seeds = brute_force.groups(net), Plan(), {}, 16
    copies = x.repeat(12, *[1] * (x.dim() - 1))
    for seed in range(seeds):
        report = fimprobe.measure(
            net, copies, likelihood="categorical", estimators=("i1",), seed=seed, plan=plan
        )
        for key in groups:
            geometry = brute_force.group_of(report, key).geometry
            seen.setdefault(key, []).append(geometry.jacobian_norm**2)
            assert geometry.jacobian_spectral_norm is None
    for key, index in groups.items():
        want = dense.mean(j[:, index].square().sum() for j in js)
        have = torch.tensor(seen[key])
        error = float(have.std()) / seeds**0.5
        assert abs(float(have.mean()) - want) <= limit(seeds) * error + 1e-10 * want, key
        assert error < 0.1 * want, key
