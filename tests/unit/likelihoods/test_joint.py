"""The joint distribution of several heads, against its labels enumerated together."""

import itertools

import pytest
import torch

import fimprobe
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian, Joint, Poisson, get_likelihood
from fimprobe.likelihoods.base import OutputNorms
from fimprobe.likelihoods.size_biased import draw_size_biased, has_size_biased_draws
from tests.oracles.brute_force import (
    bernoulli_labels,
    categorical_labels,
    enumerate_fisher,
    gaussian_labels,
)

SIGMA = 0.7
HEADS = {
    "tokens": (Categorical(), (2, 3), lambda h: categorical_labels(h, 2, 3)),
    "classes": (Categorical(), (3,), lambda h: categorical_labels(h, 1, 3)),
    "channels": (
        Categorical(class_dim=1),
        (2, 2),
        lambda h: ((w, d.view(2, 2).T.reshape(-1)) for w, d in
                   categorical_labels(h.view(2, 2).T.reshape(-1), 2, 2)),
    ),
    "bits": (Bernoulli(), (2,), bernoulli_labels),
    "bit": (Bernoulli(), (), bernoulli_labels),
    "value": (Gaussian(SIGMA), (1,), lambda h: gaussian_labels(h, SIGMA)),
}  # fmt: skip
PAIRS = {
    "two classifiers": ("classes", "tokens"),
    "classes and bits": ("classes", "bits"),
    "bits first": ("bits", "classes"),
    "of independent components only": ("bits", "bit"),
    "maps and a bit": ("channels", "bit"),
    "regression": ("classes", "value"),
}


def joint_of(heads):
    joint = Joint(families={name: HEADS[name][0] for name in heads})
    return joint.bind([HEADS[name][1] for name in heads])


def joint_labels(h, heads):
    """Every labelling of all heads, its probability and its score at the joined outputs."""
    sizes = [torch.Size(HEADS[name][1]).numel() for name in heads]
    tables = [list(HEADS[name][2](piece)) for name, piece in zip(heads, h.split(sizes), strict=True)]
    for labels in itertools.product(*tables):
        weight = torch.stack([w for w, _ in labels]).prod()
        yield weight, torch.cat([d for _, d in labels])


def outputs_of(heads, size=3):
    generator = torch.Generator().manual_seed(len(str(heads)))
    count = sum(torch.Size(HEADS[name][1]).numel() for name in heads)
    return 2 * torch.randn(size, count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", PAIRS)
def test_norms_and_passes_are_those_of_all_labels_together(name):
    heads = PAIRS[name]
    joint, h = joint_of(heads), outputs_of(heads)
    norms, passes = joint.norms(h, None), list(joint.exact_passes(h, None))
    assert len(passes) == joint.count_passes(h)
    columns = list(joint.hutchinson_passes(h, None))
    assert len({p.block for p in columns}) == len(columns)
    for b in range(len(h)):
        table = list(joint_labels(h[b], heads))
        w, d = torch.stack([x for x, _ in table]), torch.stack([x for _, x in table])
        fisher = torch.einsum("y,yi,yj->ij", w, d, d)
        outer = torch.einsum("yi,yj->yij", d, d).flatten(1) - fisher.flatten()
        moment = torch.einsum("y,yi,yj->ij", w, outer, outer)
        want = OutputNorms(
            fisher_norm=fisher.norm(),
            fisher_trace=fisher.trace(),
            fisher_max=torch.linalg.eigvalsh(fisher)[-1],
            fisher_min=torch.linalg.eigvalsh(fisher)[0],
            moment_norm=moment.norm(),
            moment_trace=moment.trace(),
            moment_max=torch.linalg.eigvalsh(moment)[-1],
        )
        for field in OutputNorms.__dataclass_fields__:
            value = float(getattr(norms, field)[b])
            assert value == pytest.approx(float(getattr(want, field)), rel=1e-9, abs=1e-12), field
        of_passes = sum(p.square[b] * torch.outer(p.cotangent[b], p.cotangent[b]) for p in passes)
        assert torch.allclose(of_passes, fisher)
        factor = torch.stack([p.cotangent[b] for p in columns], 1)
        assert torch.allclose(factor @ factor.T, fisher)
        signs = torch.ones_like(h)
        assert torch.allclose(joint.fisher_factor(h, signs)[b], _factor_of_heads(heads, h, b))
        # the expectation of g⁴ along a direction: fourth cumulants add over the blocks
        direction = torch.linspace(-1, 2, h.shape[1], dtype=h.dtype)
        fourth, third_of_square = 0.0, torch.zeros((), dtype=h.dtype)
        for block in {p.block for p in passes}:
            mine = [p for p in passes if p.block == block]
            g = torch.stack([p.cotangent[b] @ direction for p in mine])
            v = (torch.stack([p.square[b] for p in mine]) * g**2).sum()
            fourth += (torch.stack([p.quartic[b] for p in mine]) * g**4).sum() - 3 * v**2
            third_of_square += v
        assert float(fourth + 3 * third_of_square**2) == pytest.approx(
            float(w @ (d @ direction) ** 4), rel=1e-9
        )


def _factor_of_heads(heads, h, b):
    sizes = [torch.Size(HEADS[name][1]).numel() for name in heads]
    pieces = []
    for name, piece in zip(heads, h[b].split(sizes), strict=True):
        family, shape, _ = HEADS[name]
        one = piece.view(1, *shape)
        pieces.append(family.fisher_factor(one, torch.ones_like(one)).flatten())
    return torch.cat(pieces)


@pytest.mark.parametrize("name", PAIRS)
def test_a_mask_leaves_labels_of_single_heads_out(name):
    heads = PAIRS[name]
    joint, h = joint_of(heads), outputs_of(heads)
    shape = joint.label_shape(h)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    spread = joint.spread_mask(mask, h)
    assert spread.shape == h.shape
    square = sum(p.square[:, None] * p.cotangent.square() for p in joint.exact_passes(h, mask))
    full = sum(p.square[:, None] * p.cotangent.square() for p in joint.exact_passes(h, None))
    assert torch.allclose(square, full * spread)
    assert torch.allclose(joint.norms(h, mask).fisher_trace, (full * spread).sum(1))


@pytest.mark.parametrize("name", ["two classifiers", "bits first", "maps and a bit"])
def test_size_biased_labels_have_the_moments_of_the_models(name):
    heads = PAIRS[name]
    joint, h = joint_of(heads), outputs_of(heads, 1).expand(20_000, -1)
    assert has_size_biased_draws(joint, h)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(joint.label_shape(h), generator=generator, dtype=torch.float64)
    positions = torch.rand(len(h), generator=generator, dtype=torch.float64)
    draw = draw_size_biased(joint, h, uniforms, positions)
    table = list(joint_labels(h[0], heads))
    fisher = sum(w * torch.outer(d, d) for w, d in table)
    assert torch.allclose(draw.square, fisher.trace().expand(len(h)))
    products = torch.einsum("bi,bj->bij", draw.scores, draw.scores)
    error = products.var(0) / len(h)
    assert bool(((products.mean(0) - fisher).abs() <= 5 * error.sqrt() + 1e-12).all())
    labels = joint.quantile(h, uniforms)
    scores = joint.score(h, labels)
    products = torch.einsum("bi,bj->bij", scores, scores)
    error = products.var(0) / len(h)
    assert bool(((products.mean(0) - fisher).abs() <= 5 * error.sqrt() + 1e-12).all())


def test_a_regression_head_draws_from_the_model():
    assert not has_size_biased_draws(joint_of(("classes", "value")), outputs_of(("classes", "value")))


class Heads(torch.nn.Module):
    def __init__(self, heads):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trunk, self.tops = torch.nn.Linear(3, 4), torch.nn.ModuleDict()
        self.shapes = {name: HEADS[name][1] for name in heads}
        for name, shape in self.shapes.items():
            self.tops[name] = torch.nn.Linear(4, torch.Size(shape).numel())
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x):
        h = self.trunk(x).tanh()
        return {n: self.tops[n](h).reshape(len(x), *s) for n, s in self.shapes.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_a_measurement_is_that_of_the_joint_labels(name):
    heads = PAIRS[name]
    model, x = Heads(heads).double(), outputs_of(("bits",) * 3)[:, :3]
    diag, var, _ = enumerate_fisher(
        model,
        (x,),
        lambda h: joint_labels(h, heads),
        lambda out: torch.cat([v.reshape(len(x[:1]), -1) for v in out.values()], 1),
    )
    report = fimprobe.measure(
        model, x, likelihood=joint_of(heads).families, draws="exact", diagonals=True
    )
    for parameter in report.parameters:
        i1 = report.parameters[parameter].i1
        want = torch.stack([d[parameter] for d in diag]).mean(0)
        assert torch.allclose(i1.diagonal[parameter].flatten(), want, rtol=1e-9, atol=1e-12)
        label = torch.stack([v[parameter] for v in var]).mean(0).sum()
        assert i1.label_variance == pytest.approx(float(label), rel=1e-8, abs=1e-12)
    total = report.total
    for estimate in (total.i1, total.i2):
        assert estimate.covariance_norm <= estimate.sharp_bound * (1 + 1e-9)
        assert estimate.sharp_bound <= estimate.bound * (1 + 1e-9)
    assert total.i2.trace == pytest.approx(total.i1.trace, rel=1e-8)


def test_the_norm_of_the_covariance_of_mixed_heads():
    heads = ("bits", "classes")
    model, x = Heads(heads).double(), torch.tensor([[0.4, -1.0, 0.7]], dtype=torch.float64)
    out = model(x)
    h = torch.cat([v.flatten() for v in out.values()])
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True) for y in h]
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, row, strict=True)
                ]
            )
            for row in rows
        ]
    )
    table = list(joint_labels(h.detach(), heads))
    w = torch.stack([a for a, _ in table])
    outer = torch.stack([torch.outer(d @ jacobian, d @ jacobian).flatten() for _, d in table])
    centred = (outer - w @ outer) * w[:, None].sqrt()
    want = (centred @ centred.T).norm()
    report = fimprobe.measure(
        model, x, likelihood={"bits": "bernoulli", "classes": "categorical"}, draws="exact",
        estimators=["i1"],
    )  # fmt: skip
    assert report.total.i1.covariance_norm == pytest.approx(float(want), rel=1e-8)


def test_labels_of_data_are_joined_too():
    heads = ("classes", "bits")
    model, x = Heads(heads).double(), outputs_of(heads)[:, :3]
    classes, bits = torch.tensor([0, 2, -100]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    labels = torch.cat([classes[:, None].double(), bits.double()], 1)
    options = {"estimators": ("i1", "empirical"), "labels": labels, "draws": 2}
    report = fimprobe.measure(model, x, likelihood=["categorical", "bernoulli"], **options)
    want = 0.0
    for b in range(3):
        out = model(x[b : b + 1])
        loss = torch.nn.functional.cross_entropy(out["classes"], classes[b : b + 1], reduction="sum")
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
            out["bits"], bits[b : b + 1].double(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        want += sum(float(g.square().sum()) for g in gradients) / 3
    assert report.total.empirical.trace == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(3, 2), "must have the shape"),
        (torch.full((3, 3), 0.5), "head 'classes' must be whole numbers"),
        (torch.full((3, 3), 7.0), "head 'classes'.*from 0 to 2"),
    ],
)
def test_wrong_labels_name_their_head(labels, words):
    heads = ("classes", "bits")
    with pytest.raises(FimprobeError, match=words):
        joint_of(heads).check_labels(outputs_of(heads), labels.double())


def test_families_by_name_and_by_position():
    joint = get_likelihood(["categorical", Gaussian(SIGMA)])
    assert joint == Joint(families={"0": Categorical(), "1": Gaussian(SIGMA)})
    assert get_likelihood({"a": "poisson"}).families == {"a": Poisson()}
    for wrong, words in [([], "got none"), ([["categorical"]], "one family for each head")]:
        with pytest.raises(FimprobeError, match=words):
            get_likelihood(wrong)


def test_an_output_that_does_not_exist_is_named():
    model, x = Heads(("classes", "bits")), torch.zeros(2, 3)
    with pytest.raises(FimprobeError, match=r"got 'bites'; it returned \['classes', 'bits'\]"):
        fimprobe.measure(model, x, likelihood={"classes": "categorical", "bites": "bernoulli"})
    with pytest.raises(FimprobeError, match="head 'bit': outputs must be logits"):
        fimprobe.measure(
            Heads(("classes", "bit")), x, likelihood={"classes": "categorical", "bit": "categorical"}
        )
