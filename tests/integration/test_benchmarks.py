"""The benchmarks run and judge rightly; peers of the extra ``test`` are what their rows claim."""

import copy
import sys

import pytest
import torch
from clock import Progress, Ratio, interleaved, versions
from cost import absent
from footprint import peak_mb
from growth import AXES, cliffs, flag, slope
from peers import PEERS
from problems import TINY, for_peers, forward_backward, make_problem
from rows import OURS, Contender, Row
from suite import COMMITTED, is_slower, mark_slower, parse_ratios
from truth import fisher_diagonal, judge
from variance import measure_spread

MLP, CNN, UNTIED, TIED = TINY
INSTALLED = [row for row in PEERS if row.package in ("torch", "backpack-for-pytorch")]


def named(text, rows=OURS + PEERS):
    return next(row for row in rows if text in row.name)


@pytest.mark.parametrize("row", OURS, ids=lambda row: row.name)
def test_our_rows_are_the_fisher_information(row):
    verdict = judge(row, make_problem(MLP, tiny=True), 40)
    assert verdict.complete, str(verdict)


@pytest.mark.parametrize("name", (CNN, UNTIED, TIED))
def test_our_rows_cover_every_parameter(name):
    pytest.importorskip("transformers")
    problem = make_problem(name, tiny=True)
    expected = fisher_diagonal(problem)
    for row in OURS if name != TIED else (OURS[0], named("all bounds")):
        if "BackPACK" not in row.name or name == CNN:
            found = row.make(problem).draw()
            assert {n: d.shape for n, d in found.items()} == {n: d.shape for n, d in expected.items()}


@pytest.mark.parametrize("row", INSTALLED, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore")
def test_installed_peers_are_right_where_their_rows_say_so(row):
    for name in (MLP, CNN):
        verdict = judge(row, for_peers(make_problem(name, tiny=True)), 100)
        assert verdict.complete, (name, str(verdict))


@pytest.mark.filterwarnings("ignore")
def test_what_a_peer_lacks_is_told():
    pytest.importorskip("transformers")
    problem = for_peers(make_problem(UNTIED, tiny=True))
    verdict = judge(named("SumGradSquared"), copy.deepcopy(problem), 200)
    assert verdict.right and verdict.missing and all("ln_" in name for name in verdict.missing)
    assert "NotImplementedError" in judge(named("DiagGGNExact"), problem).error


def test_conv1d_written_as_linear_is_the_same_network():
    pytest.importorskip("transformers")
    for name in (UNTIED, TIED):
        problem = make_problem(name, tiny=True)
        same = for_peers(problem)
        torch.testing.assert_close(same.model(problem.x), problem.model(problem.x))
        assert same.parameters == problem.parameters


def test_wrong_numbers_are_found():
    problem = make_problem(MLP, tiny=True)
    right = named("vmap")

    def spoiled(change, **options):
        def make(problem):
            found = right.make(problem)
            return Contender(found.run, lambda: change(found.draw()))

        return judge(Row("spoiled", make, **options), problem, 100)

    half = spoiled(lambda d: {n: x / 2 for n, x in d.items()})
    assert len(half.ratios) == 6 and all(0.4 < x < 0.6 for x in half.ratios.values())
    assert not spoiled(lambda d: d, mean=True).right
    assert not spoiled(lambda d: d, exact=True).right
    swapped = spoiled(lambda d: d | {"0.weight": d["0.weight"].flip(0)})
    assert list(swapped.ratios) == ["0.weight"]
    missing = spoiled(lambda d: {n: x for n, x in d.items() if n != "0.weight"})
    assert missing.right and not missing.complete and "% of parameters" in str(missing)


def test_a_peer_that_is_not_installed_is_a_row_that_says_so():
    def make(problem):
        import no_such_package  # noqa: F401

    assert "no_such_package" in judge(Row("absent", make), make_problem(MLP, tiny=True)).error
    assert versions(["no-such-package"]) == "no-such-package not installed"
    assert absent("ModuleNotFoundError: No module named 'no_such_package'") == "not installed"
    assert absent("NotImplementedError: GELU") == "–"


def test_spread_is_that_of_the_label_draws():
    """Two draws halve the variance of one; the diagonal of exact labels has none."""
    problem = make_problem(MLP, tiny=True)
    one, two, none = (
        measure_spread(row, row.make(problem), problem).total()
        for row in (OURS[0], OURS[1], named("exact labels"))
    )
    assert 0.2 < two / one < 1.2 and none == 0


def test_interleaved_gives_ratios_and_memory_is_that_of_the_run():
    problem = make_problem(MLP, tiny=True)
    unit, ratios = interleaved(forward_backward(problem), {"same": forward_backward(problem)}, 5)
    assert unit > 0 and ratios["same"].low <= ratios["same"].high
    if sys.platform == "linux":
        assert 40 < peak_mb(lambda: torch.ones(50 * 2**18).sum()) < 80


def test_growth_is_fitted_and_flagged():
    sizes = (1, 10, 100, 1000)
    axis = AXES["MLP, batch"]
    assert slope(sizes, [x**2 for x in sizes]) == pytest.approx(2)
    assert cliffs(sizes, [1, 10, 500, 1000]) == [100] and not cliffs(sizes, list(sizes))
    line = [32.0, 128.0, 512.0, 2048.0]
    assert not flag(axis, "Î₁, S=1", line, line)
    assert "above 1" in flag(axis, "Î₁, S=1", [x**1.5 for x in line], line)


TABLE = """
| | MLP 784, B=256 | CNN 3 conv |
|---|---|---|
| forward+backward | 6.5 ms | 33.2 ms |
| ours | 1.65 (1.58 – 1.72) | 2.00 (1.90 – 2.10) |
| peer | ✗ 2.67 (2.61 – 2.70) | – |
| other | ◐ 1.00 (0.90 – 1.10) | not installed |

| | MLP 784, B=256 | CNN 3 conv |
|---|---|---|
| forward+backward | 3 MB | 26 MB |
| ours | 1 · 7 MB | 9.99 (9.98 – 10.0) |
"""


def test_times_are_read_from_the_first_table_and_marked_where_they_got_slower():
    mlp, cnn = "MLP 784, B=256", "CNN 3 conv"
    assert parse_ratios(TABLE) == {
        ("ours", mlp): Ratio(1.65, 1.58, 1.72),
        ("ours", cnn): Ratio(2.0, 1.9, 2.1),
        ("other", mlp): Ratio(1.0, 0.9, 1.1),
    }
    same = "2.00 (1.90 – 2.10)"
    slower = TABLE.replace("1.65 (1.58 – 1.72)", same).replace("1.00 (0.90", "1.08 (0.95")
    text, marked = mark_slower(slower, TABLE)
    assert f"| ours | ▲ {same} | {same} |" in text and text.count("▲") == 1
    assert marked == [f"- ▲ ours, MLP 784: {same}, was 1.65 (1.58 – 1.72)"]
    assert parse_ratios(text) == parse_ratios(slower)  # a table with marks may be committed
    assert mark_slower(TABLE, TABLE) == (TABLE.rstrip("\n"), [])
    assert parse_ratios("no table") == {} and mark_slower(TABLE, "")[1] == []
    # a median outside of the quartiles of single pairs counts too
    assert not is_slower(Ratio(1.9, 2.0, 2.1), Ratio(1.8, 1.7, 1.95))
    assert is_slower(Ratio(2.1, 2.0, 2.1), Ratio(1.8, 1.7, 1.95))


def test_the_committed_table_has_the_rows_of_the_benchmark():
    committed = parse_ratios(COMMITTED.read_text("utf-8"))
    assert {name for name, _ in committed} <= {row.name for row in OURS + PEERS}
    assert len(committed) > 30


def test_the_progress_bar_shows_share_and_step(capsys):
    bar = Progress(4)
    bar.step("MLP, correctness")
    bar.step("MLP, memory")
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("[########  ") and " 25 % " in last and "MLP, memory" in last
