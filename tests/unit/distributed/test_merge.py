"""Shares of a batch, measured one by one and merged, against the batch measured at once."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fimprobe
from fimprobe import FimprobeError
from fimprobe.distributed.merge import merge, merge_bounds
from fimprobe.distributed.parameter_sums import common_shapes, drop_sums, local_sums, sum_shapes
from fimprobe.estimators import reliability
from fimprobe.estimators.i2 import block_grams, diagonal_of, whole_gram
from fimprobe.estimators.variance_bounds import hessian_norm_squares
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from tests.models.cases import CASES
from tests.support.agreement import flat

pytestmark = pytest.mark.usefixtures("double", "raw_numbers")
WITHHOLD = reliability.withhold
ALL = ("i1", "i2", "ih", "empirical")
DIAGONALS = ("diagonal", "diagonal_label_variance", "diagonal_input_variance")


measure = functools.partial(fimprobe.measure, second_order={"probes": 2})
"""Spot checks and their choice are for processes that really run together: each draws its own."""


class Done(Exception):
    """A share is measured."""


class Turn:
    """The processes of a measurement, one after another: the last one merges."""

    def __init__(self, rank, told, found, seen, first):
        self.rank, self.told, self.found, self.seen, self.first = rank, told, found, seen, first
        self.size = len(told)

    def run_everywhere(self, act):
        self.told[self.rank] = act()
        if self.first:
            raise Done
        return self.told

    def measure_together(self, act):
        self.found[self.rank] = act()
        if None in self.found:
            raise Done
        measured, bounds = zip(*self.found, strict=True)
        shapes = common_shapes([sum_shapes(m) for m in measured])
        each = [local_sums(m, shapes) for m in measured]
        sums = {key: sum(x[key] for x in each) for key in shapes}
        whole = merge([drop_sums(m) for m in measured], sums)
        self.seen += [*measured, whole]
        return whole, merge_bounds(bounds)


def shared(models, parts, labels=None, mask=None, seen=None, **options):
    """The report of shares measured in turn; ``labels`` and ``mask`` are lists like ``parts``."""
    told, found, report = [None] * len(parts), [None] * len(parts), None
    models = models if isinstance(models, list) else [models] * len(parts)
    for first in (True, False):  # what all have to tell of themselves, then the measurements
        for rank, (model, part) in enumerate(zip(models, parts, strict=True)):
            own = {
                **({} if labels is None or labels[rank] is None else {"labels": labels[rank]}),
                **({} if mask is None else {"mask": mask[rank]}),
            }
            if labels is not None and labels[rank] is None:
                own["estimators"] = ("i1", "i2", "ih")
            with contextlib.suppress(Done):
                turn = Turn(rank, told, found, seen if seen is not None else [], first)
                report = measure(model, part, ranks=turn, **options | own)
    return report


def assert_same(report, whole, rel=1e-9, without=("seconds", "advice")):
    """Every number, word and diagonal."""
    a, b = (x.to_dict() for x in (report, whole))
    for record in (a, b):  # what is 0 but for rounding is told with its own errors
        record["sizes"] = [pair for pair in record["sizes"] if pair[0] > -25]
    a, b = (
        {k: v for k, v in flat(x).items() if not any(f"/{w}" in k for w in without)} for x in (a, b)
    )
    assert a.keys() == b.keys()
    for key, value in b.items():
        if isinstance(value, float):
            assert a[key] == pytest.approx(value, rel=rel, abs=0, nan_ok=True), key
        else:
            assert a[key] == value, key
    for group in (*whole.parameters, None):
        mine, theirs = (x.total if group is None else x.parameters[group] for x in (report, whole))
        for kind in ALL:
            if getattr(theirs, kind) is None:
                continue
            for field in DIAGONALS:
                have, want = (getattr(getattr(x, kind), field) for x in (mine, theirs))
                assert (have is None) == (want is None)
                for name in want or {}:
                    size = max(float(want[name].abs().max()), 1e-300)
                    assert float((have[name] - want[name]).abs().max()) <= rel * size, (kind, name)


def split(inputs, sizes):
    batch = Batch.of(inputs)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert ends[-1] == batch.size
    return [batch[slice(end - n, end)] for end, n in zip(ends, sizes, strict=True)]


# how experts are reached, and which comes first, depends on the samples
REASONS = {"experts": ["coverage", *(f"layers/parts.{i}/geometry/reason" for i in range(5))]}
SIZES = {2: [1, 1], 3: [1, 2], 4: [3, 1], 5: [1, 3, 1], 6: [2, 1, 2, 1]}
NAMES = [
    "mlp", "linear on sequences", "conv2d few taps", "batch norm", "layer norm", "attention net",
    "tied and reused", "tied to a raw parameter", "functional tie", "multihead self", "lstm", "lora",
    "packed sequences", "experts", "class token", "scalar parameter", "embedding [1, T] index, T = B",
    "folded frames", "bag mean", "GPT-2, tied",
]  # fmt: skip


def case(name):
    torch.manual_seed(1)
    made = CASES[name]()
    return made.model.double(), tuple(x.double() if x.is_floating_point() else x for x in made.inputs)


# models whose shares differ from the whole in some field, and every third of the rest
FREQUENT = {*REASONS, *NAMES[::3]}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FREQUENT else pytest.mark.long) for n in NAMES]
)
def test_shares_of_every_kind_of_model(name):
    model, inputs = case(name)
    options = {"likelihood": "categorical", "estimators": ("i1", "i2", "ih"), "diagonals": True}
    whole = measure(model, inputs, seed=3, **options)
    report = shared(model, split(inputs, SIZES[whole.batch_size]), seed=3, **options)
    assert_same(report, whole, without=("seconds", "advice", *REASONS.get(name, ())))


@pytest.mark.parametrize("name", ["mlp", "tied and reused", "experts", "linear on sequences"])
def test_exact_labels(name):
    model, inputs = case(name)
    options = {"likelihood": "categorical", "draws": "exact", "estimators": ("i1", "i2", "ih")}
    whole = measure(model, inputs, diagonals=True, **options)
    report = shared(model, split(inputs, SIZES[whole.batch_size]), diagonals=True, **options)
    assert whole.total.i1.covariance_norm > 0
    assert_same(report, whole, without=("seconds", "advice", *REASONS.get(name, ())))


def test_probes_may_differ_where_a_single_sample_is_seen_another_way():
    """[T·B, d] of one sample looks like a sequence: other random probes of Î₂, all else as it is."""
    model, inputs = case("time-major fold")
    options = {"likelihood": "categorical", "estimators": ("i1", "i2", "ih"), "draws": "exact"}
    whole = measure(model, inputs, **options)
    report = shared(model, split(inputs, [1, 2]), **options)
    for kind in ("i1", "ih"):
        have, want = getattr(report.total, kind), getattr(whole.total, kind)
        assert have.total_label_variance == pytest.approx(want.total_label_variance, rel=1e-9)
        assert have.label_variance == pytest.approx(want.label_variance, rel=1e-9)
    error = (report.total.i2.probe_error**2 + whole.total.i2.probe_error**2) ** 0.5
    difference = report.total.i2.label_variance - whole.total.i2.label_variance
    assert 0 < abs(difference) < 4 * error


@pytest.mark.parametrize(
    ("likelihood", "draws"),
    [("gaussian", 3), ("bernoulli", 1), ("bernoulli", "exact"), ("poisson", 2)],
)
def test_families_and_draws(likelihood, draws):
    model, inputs = case("mlp")
    options = {"likelihood": likelihood, "draws": draws, "seed": 9}
    whole = measure(model, inputs, **options)
    assert_same(shared(model, split(inputs, [2, 3]), **options), whole)


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("label_sampling", ["size_biased", "model", "exact"])
def test_what_cannot_be_believed_is_withheld_alike(label_sampling, sure, monkeypatch):
    """The share of the score that was seen is that of all processes' labels."""
    monkeypatch.setattr(reliability, "withhold", WITHHOLD)
    model, _ = case("mlp")
    inputs = torch.randn(12, 4)
    if sure:
        with torch.no_grad():
            model[4].bias[1] += 9
    draws = "exact" if label_sampling == "exact" else 2
    options = {"likelihood": "categorical", "estimators": ("i1", "i2", "ih"), "draws": draws}
    if draws != "exact":
        options["label_sampling"] = label_sampling
    whole = measure(model, inputs, **options)
    report = shared(model, split(inputs, [4, 5, 3]), **options)
    assert whole.label_sampling == label_sampling and whole.outputs.fisher_trace > 0
    assert (whole.seen_mass is None) == (label_sampling != "model")
    assert (whole.total.i1.trace is None) == (sure and label_sampling == "model")
    assert (whole.total.i1.std_error is None) == (whole.total.i1.trace is None)
    assert_same(report, whole)


@pytest.mark.parametrize("engine", ["auto", "backpack"])
def test_all_estimators_with_backpack(engine):
    model, inputs = case("mlp")
    model[3] = nn.Tanh()
    labels = torch.tensor([0, 2, 1, 1, 0])
    options = {"likelihood": "categorical", "estimators": ALL, "engine": engine, "diagonals": True}
    options["second_order"] = {"probes": 3} if engine == "auto" else "exact"
    whole = measure(model, inputs, labels=labels, **options)
    report = shared(model, split(inputs, [1, 4]), labels=labels.split([1, 4]), **options)
    assert whole.total.empirical.cosine is not None
    assert "a single process only" in report.total.empirical.unknown["noise_scale"]
    assert_same(report, whole, without=("seconds", "advice", "noise_scale"))


def test_labels_that_one_process_lacks_leave_the_rest():
    model, inputs = case("mlp")
    options = {"likelihood": "categorical", "estimators": ALL}
    plain = {**options, "estimators": ("i1", "i2", "ih")}
    report = shared(model, split(inputs, [2, 3]), labels=[torch.tensor([0, 1]), None], **options)
    assert report.total.empirical is None
    assert_same(report, measure(model, inputs, **plain))


@pytest.mark.parametrize("bounds", [True, False])
def test_masked_sequences(bounds):
    model, (tokens,) = case("attention net")
    mask = torch.rand(tokens.shape) > 0.4
    mask[1] = False
    options = {"likelihood": "categorical", "bounds": bounds, "draws": 4, "diagonals": True}
    whole = measure(model, tokens, mask=mask, **options)
    report = shared(model, split(tokens, [3, 1]), mask=mask.split([3, 1]), **options)
    assert_same(report, whole)


def test_float32():
    torch.set_default_dtype(torch.float32)
    model, inputs = case("conv2d few taps")
    model, inputs = model.float(), inputs[0].float()
    whole = measure(model, inputs, likelihood="categorical")
    report = shared(model, split(inputs, [2, 1]), likelihood="categorical")
    for kind in ("i1", "i2"):
        for field in ("trace", "label_variance", "total_label_variance", "rel_error"):
            have, want = (getattr(getattr(x.total, kind), field) for x in (report, whole))
            assert have == pytest.approx(want, rel=1e-4, abs=0)


class Positions(nn.Module):
    """Each position by itself, with a layer that is used ``times`` times."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, times=1):
        x = torch.tanh(self.enter(x))
        twice = torch.as_tensor(times) == 2
        once = torch.tanh(self.again(x))
        if bool(twice.any()):
            once = torch.where(
                twice.view(-1, *[1] * (x.dim() - 1)), torch.sin(self.again(once)), once
            )
        return self.leave(once)


def hessian_norms(curvature):
    """Σ_a ‖H_a‖² [J, B, 1] from the labels' seeds and, behind them, those of the bounds."""
    gram = diagonal_of(whole_gram(curvature).unsqueeze(1)).squeeze(1)
    return hessian_norm_squares(gram, curvature.draws, True, 3)


@pytest.mark.parametrize("lengths", [(2, 4), (5, 6, 2)])  # below and across the limit of kept passes
def test_sequences_of_other_lengths(lengths):
    """Exact labels of shorter sequences are those of padded ones, whatever is beyond them masked."""
    torch.manual_seed(0)
    model, most = Positions(), max(lengths)
    parts = [torch.randn(2, t, 4) for t in lengths]
    padded = torch.cat([F.pad(x, (0, 0, 0, most - x.shape[1])) for x in parts])
    mask = torch.cat([(torch.arange(most) < t).expand(2, -1) for t in lengths])
    options = {"likelihood": "categorical", "draws": "exact", "estimators": ("i1", "i2", "ih")}
    whole = measure(model, padded, mask=mask, diagonals=True, **options)
    seen = []
    report = shared(model, parts, diagonals=True, seen=seen, **options)
    *curves, merged = [m.curvature for m in seen]
    each = torch.cat([hessian_norms(c) for c in curves], 1)
    assert torch.allclose(hessian_norms(merged), each, rtol=1e-12, atol=0) and (each > 0).all()
    assert all(layer.activation is None for layer in report.layers.values())
    known = ("trace", "label_variance", "input_variance", "std_error", "rel_error", "covariance_norm")
    for name in (*whole.parameters, *whole.layers, "total"):
        groups = [
            r.total if name == "total" else (r.parameters | r.layers)[name] for r in (report, whole)
        ]
        for kind in ("i1", "ih"):
            have, want = (getattr(g, kind) for g in groups)
            for field in (*known, "total_label_variance", "bound", "sharp_bound", "diagonal_bound"):
                pair = getattr(have, field), getattr(want, field)
                assert None in pair or pair[0] == pytest.approx(pair[1], rel=1e-9, abs=0), (
                    name,
                    field,
                )
                assert (pair[0] is None) == (pair[1] is None)
        # Î₂'s probes are drawn by length: compared where they are not needed
        assert groups[0].i2.trace == pytest.approx(groups[1].i2.trace, rel=1e-9, abs=0)
        zero = groups[1].i2.label_variance == 0
        assert (groups[0].i2.label_variance == 0) == zero == name.startswith("leave")
    assert (report.total.i2.covariance_norm is None) == (most * 3 > 16)
    shared(model, parts, likelihood="categorical", draws=3)  # sampled labels: no passes to match


def test_other_lengths_draw_from_streams_of_their_own(monkeypatch):
    """Rows of 4·2 and of 2·2 numbers from one stream would overlap."""
    torch.manual_seed(0)
    seen, made = [], []

    class Watched(fimprobe.likelihoods.Categorical):
        def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
            seen.append(uniforms.flatten().tolist())
            return super().quantile(outputs, uniforms)

    options = {"estimators": ("i1",), "bounds": False}
    model, parts = Positions(), [torch.randn(3, 4, 4), torch.randn(3, 2, 4)]
    shared(model, parts, likelihood=Watched(), label_sampling="model", **options)
    numbers = [n for each in seen for n in each]
    assert len(set(numbers)) == 2 * (3 * 4 + 3 * 2)  # a check of a sample draws its numbers again
    # size-biased labels have a further number for each input, the position
    original = Draws._uniforms

    def watched(self, *args):
        drawn = original(self, *args)
        made.extend([drawn] * (self.count == 2))  # a plan takes a label of its own
        return drawn

    monkeypatch.setattr(Draws, "_uniforms", watched)
    shared(model, parts, likelihood="categorical", **options)
    numbers = [n for each in made for n in each.flatten().tolist()]
    assert len(set(numbers)) == 2 * (3 * 4 + 3 * 2) + 2 * (
        3 + 3
    )  # a check of a sample draws its numbers again


def test_a_layer_that_only_one_process_uses_twice():
    """The process that uses it once has its block of R only, which is the same there."""
    torch.manual_seed(0)
    model, x, times = Positions(), torch.randn(5, 4), torch.tensor([1, 1, 1, 2, 2])
    options = {"likelihood": "categorical", "draws": "exact", "estimators": ("i1", "i2")}
    seen = []
    whole = measure(model, (x, times), **options)
    report = shared(model, [(x[:3], times[:3]), (x[3:], times[3:])], seen=seen, **options)
    assert report.total.i2.total_label_variance == pytest.approx(
        whole.total.i2.total_label_variance, rel=1e-9, abs=0
    )
    *curves, merged = [m.curvature for m in seen]
    assert [c.parameters["again.weight"].joint is None for c in curves] == [True, False]
    for names in (["again.weight"], ["again.bias", "again.weight"], ["leave.weight"]):
        block = {"block": names}
        each = torch.cat([block_grams(c, block) for c in curves], 2)
        assert torch.equal(block_grams(merged, block), each)


def test_the_first_process_has_the_running_statistics():
    model, inputs = case("batch norm")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].running_var.mul_(3)
        other[1].num_batches_tracked.add_(7)
    report = shared([model, other], split(inputs, [3, 1]), likelihood="categorical")
    assert_same(report, measure(model, inputs, likelihood="categorical"))
    assert other[1].running_var.equal(model[1].running_var * 3)


def test_other_models_are_told_apart():
    model, inputs = case("mlp")

    def trained(change):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        shared([model, other], split(inputs, [2, 3]), likelihood="categorical")

    trained(lambda net: net[4].weight.mul_(1 + 1e-5))  # rounding apart
    with pytest.raises(FimprobeError, match=r"parameter '4.weight' must be equal .* process 1"):
        trained(lambda net: nn.init.normal_(net[4].weight))
    with pytest.raises(
        FimprobeError, match=r"parameter '2.bias' must be equal in all processes, but process 1"
    ):
        trained(lambda net: net[2].register_parameter("bias", None))


def test_sums_of_other_shapes_are_refused():
    key = ("i1", "0.weight", "a2")
    parts = [{key: (torch.Size([n]), torch.float64)} for n in (2, 3)]
    with pytest.raises(FimprobeError, match="'0.weight' must have one shape and type"):
        common_shapes(parts)
    assert common_shapes([parts[0], {}]) == parts[0]


def test_draws_of_a_share_are_rows_of_the_whole():
    shape = torch.Size([7, 3])
    whole = Draws(count=2, seed=4).uniforms_for(slice(0, 7), 7, shape)
    share = Draws(count=2, seed=4, first=2, total=7).uniforms_for(slice(1, 3), 4, torch.Size([4, 3]))
    assert torch.equal(share, whole[3:5])
