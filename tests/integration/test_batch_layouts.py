"""Where the samples lie is known, not concluded from shapes that agree by accident.

The oracle runs each sample alone, without fimprobe, and enumerates its labels.
"""

import pytest
import torch
from torch import Tensor, nn

import fimprobe
from fimprobe.model.batch import Batch
from tests.models.cases import Lambda

T, WIDTH, CLASSES = 4, 3, 3
SIZES = (2, 3, 4, 5, 8)  # also T, WIDTH, and multiples of them


def diagonal(model, samples):
    """Mean over the samples of Σ_y p(y) (∂ log p(y)/∂θ)², one tensor for each parameter."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    model.eval()
    for args in samples:
        log_p = model(*args).log_softmax(-1)[0]
        for y in range(len(log_p)):
            gradients = torch.autograd.grad(
                log_p[y], list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    total[name] += float(log_p[y].detach().exp()) * g**2
    return {n: x / len(samples) for n, x in total.items()}


def check(model, args, samples, **options):
    report = fimprobe.measure(
        model,
        args,
        likelihood="categorical",
        draws="exact",
        estimators=["i1"],
        diagonals=True,
        bounds=False,
        second_order="off",
        **options,
    )
    agrees(report, model, samples)
    return report


def agrees(report, model, samples):
    for name, expected in diagonal(model, samples).items():
        measured = report.parameters[name].i1.diagonal[name]
        torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-12)


class Table(nn.Module):
    """A block with a parameter that no rule covers; it is passed a table [T, ...] of no sample."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, table, *, lengths=None):
        if self.kind == "mask":
            return ((x * self.scale) @ x.transpose(1, 2) + table[:, :T]).softmax(-1) @ x
        if self.kind == "time first":
            return torch.sin(x.transpose(0, 1) * self.scale).transpose(0, 1) + table[:, :WIDTH]
        return torch.sin((x + table[:, :WIDTH]) * self.scale)


class Around(nn.Module):
    def __init__(self, block, places=T):
        super().__init__()
        self.block, self.out = block, nn.Linear(WIDTH, CLASSES)
        self.register_buffer("table", torch.randn(places, T))

    def forward(self, x):
        return self.out(self.block(x, self.table).mean(1))


class TimeFirst(nn.Module):
    """Layers see [T, B, width]; a T that equals B must not confuse them."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.norm(self.a(x.transpose(0, 1))).tanh().mean(0))


class Folded(nn.Module):
    """Layers see [B·T, width] with as many columns as samples."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        y = self.a(x.reshape(-1, WIDTH)).tanh()
        return self.out(y.unflatten(0, (-1, T)).mean(1))


class SharedTable(nn.Module):
    """A layer sees a table of T rows, which all samples share."""

    def __init__(self):
        super().__init__()
        self.table, self.a = nn.Parameter(torch.randn(T, WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.out((self.a(self.table).tanh() * x).sum(1))


class Positions(nn.Module):
    """Positions are looked up once for the whole batch, with an index [T] or [1, T]."""

    def __init__(self, leading):
        super().__init__()
        self.leading = leading
        self.places, self.out = nn.Embedding(T, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        index = torch.arange(T)
        y = self.norm(self.places(index[None] if self.leading else index))
        return self.out((x * y).tanh().sum(1))


MODELS = {
    "mask": lambda: Around(Table("mask")),
    "positions": lambda: Around(Table("positions")),
    "time first inside": lambda: Around(Table("time first")),
    "time first": TimeFirst,
    "folded": Folded,
    "shared table": SharedTable,
    "positions [T]": lambda: Positions(False),
    "positions [1, T]": lambda: Positions(True),
}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_no_number_of_samples_confuses(name, size):
    model, x = MODELS[name](), torch.randn(size, T, WIDTH)
    check(model, x, [(x[b : b + 1],) for b in range(size)])


@pytest.mark.parametrize("first", [5, T])
def test_a_plan_holds_at_another_number_of_samples(first):
    model, plan = Around(Table("mask")), fimprobe.Plan()
    for size in (first, T, 2 * T):
        x = torch.randn(size, T, WIDTH)
        check(model, x, [(x[b : b + 1],) for b in range(size)], plan=plan)


def test_second_derivatives_see_a_table_as_long_as_the_batch():
    model, options = Around(Table("mask")), {"likelihood": "categorical", "bounds": False}
    x = torch.randn(T, T, WIDTH)
    together = fimprobe.measure(model, x, draws="exact", diagonals=True, **options)
    alone = [
        fimprobe.measure(model, x[[b, b]], draws="exact", diagonals=True, **options) for b in range(T)
    ]
    for name in ("block.scale", "out.weight"):
        variances = [report.parameters[name].i1.label_variance for report in alone]
        assert together.parameters[name].i1.label_variance == pytest.approx(sum(variances) / T)


class Ragged(nn.Module):
    """Layers see the tokens that are no padding, of all samples in one row."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(WIDTH, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x, mask):
        tokens = self.norm(self.a(x[mask])).tanh()
        places = mask.flatten().nonzero().flatten()
        padded = torch.zeros(mask.numel(), 5).index_put((places,), tokens)
        return self.out(padded.view(*mask.shape, 5).sum(1))


class Listed(nn.Module):
    """The same with lengths as numbers, and without an operation that shows it."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)

    def forward(self, x, lengths):
        tokens = torch.cat([x[b, :n] for b, n in enumerate(lengths.tolist())])
        sums = [part.sum(0) for part in self.a(tokens).tanh().split(lengths.tolist())]
        return self.out(torch.stack(sums))


@pytest.mark.parametrize("model_class", [Ragged, Listed])
def test_ragged_tokens_are_not_dealt_out_evenly(model_class):
    model, plan = model_class(), fimprobe.Plan()
    for lengths in ([4, 4, 4, 4], [4, 4, 4, 2, 2, 2], [2, 4, 3, 3], [1, 1, 1, 1], [1, 2, 0, 1]):
        x, lengths = torch.randn(len(lengths), T, WIDTH), torch.tensor(lengths)
        second = lengths if model_class is Listed else torch.arange(T)[None] < lengths[:, None]
        samples = [(x[b : b + 1], second[b : b + 1]) for b in range(len(x))]
        check(model, (x, second), samples, plan=plan)


class Matches(nn.Module):
    """Similarities with a table of class descriptions, which is an input."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 5), nn.Linear(2, 5)

    def forward(self, x, classes, labels=None):
        return self.image(x).tanh() @ self.text(classes).T


@pytest.mark.parametrize(("rows", "size"), [(2, 6), (3, 6), (6, 6), (3, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize("with_labels", [False, True])
def test_a_table_among_the_inputs_belongs_to_all_samples(rows, size, with_labels):
    model, x, classes = Matches(), torch.randn(size, 4), torch.randn(rows, 2)
    inputs = {"x": x, "classes": classes}
    if with_labels:
        inputs["labels"] = torch.zeros(size, dtype=torch.long)
    report = check(model, inputs, [(x[b : b + 1], classes) for b in range(size)])
    named = [note for note in report.notes if "`kwargs['classes']`" in note]
    assert len(named) == (rows == size)


def test_a_table_stays_shared_at_every_step():
    """Also at a step whose batch is as long as the table and is cut to fewer samples."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x, bank):
            return self.out((self.q(x) @ bank.T).softmax(-1) @ bank)

    for sizes in ((12, 16, 20), (16, 12), (20, 16)):
        model, bank, x = Reads(), torch.randn(16, 4), torch.randn(1, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        expected = diagonal(model, [(x, bank)])
        options = {"draws": "exact", "estimators": ["i1"], "second_order": "off", "bounds": False}
        probe = fimprobe.attach(
            model,
            schedule={"every": 1},
            tensorboard=False,
            likelihood="categorical",
            batch=8,
            **options,
        )
        for size in sizes:
            loss = nn.functional.cross_entropy(
                model.train()(x.repeat(size, 1), bank), torch.zeros(size, dtype=torch.long)
            )
            loss.backward()
            optimizer.step()
            traces = {n: float(d.sum()) for n, d in expected.items()}
            assert probe.last.total.i1.trace == pytest.approx(sum(traces.values()), rel=1e-9)
        probe.detach()


class ReadByFew(nn.Module):
    """A table that only samples with a positive first entry read."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)

    def forward(self, x, table):
        y = x * self.scale
        return self.out(torch.where(x[:, :1] > 0, torch.sin(y) + y @ table.T @ table, torch.sin(y)))


@pytest.mark.parametrize("readers", [slice(3, None), slice(0, 0)], ids=["later", "none at first"])
def test_a_table_as_long_as_the_batch_that_few_samples_read(readers, double):
    x, table = -torch.randn(6, 4).abs(), torch.randn(6, 4)
    x[readers] = -x[readers]
    model = ReadByFew()
    for inputs in (x, -x):
        check(model, (inputs, table), [(inputs[b : b + 1], table) for b in range(6)])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x, mask):
        return self.out(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


def test_a_mask_with_a_row_for_each_head_of_each_sample(double):
    model, plan = Masked(), fimprobe.Plan()
    for size in (1, 3, 4):
        x, mask = torch.randn(size, 5, 4), torch.randn(2 * size, 5, 5)
        samples = [(x[b : b + 1], mask[2 * b : 2 * b + 2]) for b in range(size)]
        check(model, (x, mask), samples, plan=plan)


def test_a_bank_with_twice_as_many_rows_as_the_batch_is_shared(double):
    model = Lambda(lambda self, x, k: self.parts[0]((x @ k.T).softmax(-1) @ k), nn.Linear(4, CLASSES))
    x, bank = torch.randn(3, 4), torch.randn(6, 4)
    check(model, (x, bank), [(x[b : b + 1], bank) for b in range(3)])


def test_rows_of_a_folded_mask_are_those_of_the_selected_samples(double):
    x, mask = torch.randn(5, 4), torch.randn(10, 3)
    rows = torch.tensor([4, 1, 3])
    chosen = Batch.of((x, mask))[torch.tensor([0, 4, 1, 3])][1:].with_folded([1])
    assert torch.equal(chosen.args[0], x[rows])
    assert torch.equal(chosen.args[1].view(3, 2, 3), mask.view(5, 2, 3)[rows])


def test_samples_that_influence_each_other_are_still_refused():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, CLASSES)

        def forward(self, x, weights):
            return self.a(x - (x * weights).mean(0))

    with pytest.raises(fimprobe.FimprobeError, match="must not couple its samples"):
        fimprobe.measure(Coupled(), (torch.randn(5, 4), torch.rand(5, 1)), likelihood="categorical")


def test_a_model_that_runs_with_one_size_only_is_measured_by_shapes():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor):
            if len(x) not in (1, 6):
                raise RuntimeError("compiled for other sizes")
            return self.a(x)

    model, x = Fixed(), torch.randn(6, 4)
    check(model, x, [(x[b : b + 1],) for b in range(6)])


class Sorted(nn.Module):
    """Runs its samples in the order of their length, and puts them back."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)

    def forward(self, x, key):
        order = key.argsort()
        y = self.a(x[order].flatten(0, 1)).tanh().unflatten(0, (-1, T)).sum(1)
        return self.out(y)[order.argsort()]


def test_samples_in_another_order_are_seen():
    model, plan = Sorted(), fimprobe.Plan()
    for key in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 5, 3, 4], [5, 4, 3, 2, 1, 0]):
        x, key = torch.randn(6, T, WIDTH), torch.tensor(key)
        check(model, (x, key), [(x[b : b + 1], key[b : b + 1]) for b in range(6)], plan=plan)


def test_tokens_that_a_shift_leaves_in_place_are_seen():
    """The last sample has the mean length: a cyclic shift of the samples shifts whole groups."""
    for model_class, numbers in ((Ragged, False), (Listed, True)):
        lengths = torch.tensor([3, 3, 3, 2, 4, 3])
        x = torch.randn(6, T, WIDTH)
        second = lengths if numbers else torch.arange(T)[None] < lengths[:, None]
        check(model_class(), (x, second), [(x[b : b + 1], second[b : b + 1]) for b in range(6)])


class Biased(nn.Module):
    """A block without a rule, and a mask that may have a row for each sample or one for all."""

    def __init__(self):
        super().__init__()
        self.block, self.out = Table("mask"), nn.Linear(WIDTH, CLASSES)

    def forward(self, x, mask):
        return self.out(self.block(x, mask).mean(1))


def test_a_mask_for_all_samples_may_have_a_row_for_each_later():
    model, plan = Biased(), fimprobe.Plan()
    for kept in (plan, None):
        for rows in (1, 6, 1):
            x, mask = torch.randn(6, T, WIDTH), torch.randn(rows, T, T)
            samples = [(x[b : b + 1], mask[b % rows : b % rows + 1]) for b in range(6)]
            check(model, (x, mask), samples, plan=kept)


def test_an_argument_that_selects_a_way_has_a_plan_of_its_own():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x, time_first=False):
            y = self.a(x.transpose(0, 1)).transpose(0, 1) if time_first else self.a(x)
            return self.out(y.tanh().mean(1))

    model, x = Either(), torch.randn(T, T, WIDTH)
    for flag in (False, True, False):
        check(model, (x, flag), [(x[b : b + 1], flag) for b in range(T)])


def test_a_use_that_only_a_later_sample_has_is_seen():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, index):
            y = self.table(index).tanh().sum(1)
            rare = (index == 8).any(1, keepdim=True)
            return self.out(torch.where(rare, y * self.table.weight.sum(0), y) if rare.any() else y)

    model = Rare()
    index = torch.randint(8, (7, T))
    index[4:, 0] = 8
    check(model, index, [(index[b : b + 1],) for b in range(7)])


def test_a_model_that_no_plan_reproduces_is_refused():
    """A recurrent layer on samples sorted in the forward: refused, and no number is reported."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.out = nn.LSTM(WIDTH, 4, batch_first=True), nn.Linear(4, CLASSES)

        def forward(self, x, key):
            order = key.argsort()
            y = self.enc(x[order])[1][0][0]
            return self.out(y[order.argsort()] + self.enc(x)[1][0][0])

    key = torch.tensor([0, 1, 2, 5, 3, 4])
    x = torch.randn(6, T, WIDTH)
    try:
        check(Siamese(), (x, key), [(x[b : b + 1], key[b : b + 1]) for b in range(6)])
    except fimprobe.FimprobeError as error:
        assert "must agree with those of single samples" in str(error)
