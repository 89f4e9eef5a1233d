"""Two processes that shard a model by FSDP2: the report is the single process's, training is untouched."""

import time

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import fimprobe
from fimprobe import FimprobeError
from tests.support import fsdp_worker
from tests.support.processes import free_port, start_processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    out = tmp_path_factory.mktemp("fsdp")
    context = start_processes(fsdp_worker.main, (free_port(), out), 2)
    deadline = time.monotonic() + 200
    while not context.join(10):
        assert time.monotonic() < deadline
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def all_close(have, want, rel):
    """Numbers up to rounding; None for None."""
    return len(have) == len(want) and all(
        a == b if b is None else a == pytest.approx(b, rel=rel, abs=0)
        for a, b in zip(have, want, strict=True)
    )


@pytest.mark.parametrize("options", ["auto", "chunks"])
def test_the_report_is_that_of_one_process_on_the_whole_batch(results, options):
    for found in results:
        assert len(found[options, "mine"]) == 3
        for mine, want in zip(found[options, "mine"], found[options, "want"], strict=True):
            assert mine.keys() == want.keys() and "narrow.weight" in want
            for name in want:
                if name == "how":
                    assert mine[name] == want[name]
                else:
                    assert all_close(mine[name], want[name], 1e-10), name
            assert want["how"] == [2 if options == "auto" else 3, "size_biased", None]
            assert None not in want[""] and len(want["means"]) > 6
        assert found["chunks", "chunk"] in range(1, 5)
        left_out = {n for n, how in found[options, "coverage"].items() if how.startswith("left out")}
        assert left_out == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize("sampling", [None, "model"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_model_that_is_sure_of_its_labels(results, way, sampling):
    """Labels, weights and positions are those that one process draws for the whole batch."""
    for found in results:
        shared, whole = found["sure"][way, sampling]
        if way == "fsdp":  # a process knows the entries of its own rows only
            assert not any(name.startswith("/sizes") for name in shared)
            whole = {k: v for k, v in whole.items() if not k.startswith("/sizes")}
        assert shared.keys() == whole.keys() and len(whole) > 400
        for name, value in whole.items():
            if isinstance(value, float):
                assert shared[name] == pytest.approx(value, rel=1e-8, abs=0), name
            else:
                assert shared[name] == value, name
        assert (whole["/batch_size"], whole["/draws"]) == (24, 2)
        assert whole["/label_sampling"] == (sampling or "size_biased")
        unknown = whole["/total/i1/unknown"]
        if sampling is None:  # no label is rare
            exact, trace, error = (
                found["sure"]["exact"], whole["/total/i1/trace"], whole["/total/i1/std_error"]
            )  # fmt: skip
            assert 0 < exact < 1e-3 and abs(trace - exact) < 3 * error < exact
            assert whole["/seen_mass"] is None and "trace" not in unknown
            assert whole["/total/i1/one_label_error"] > 10
        else:  # all labels are class 0, which tells nothing: it is known, and said
            assert whole["/seen_mass"] < 1e-3 and whole["/total/i1/trace"] is None
            assert {"trace", "rel_error", "label_variance"} <= set(unknown)
        assert ("/total/i2/trace" in whole) == (way == "ddp")


def test_texts_of_other_lengths_are_drawn_for_apart(results):
    """Each process has labels of its own; all of them count alike, and none takes exact ones."""
    for found in results:
        size, draws, trace, (first, second) = found["sure"]["lengths"]
        assert (size, draws) == (24, 2) and first != second
        assert trace == pytest.approx((first + second) / 2, rel=1e-10, abs=0)


@pytest.mark.parametrize("options", ["auto", "chunks"])
def test_training_and_the_state_of_fsdp_are_bit_identical(results, options):
    assert all(found[options, "identical"] for found in results)


def test_no_process_holds_all_weights(results):
    for found in results:
        most, all_of_them = found["held"]
        assert 0 < most < 0.6 * all_of_them


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("estimators", "estimators=['i1', 'i2'] is not supported"),
        ("bounds", "bounds=True is not supported"),
        ("exact", "draws='exact' is not supported"),
    ],
)
def test_unsupported_options_are_refused_at_attach(results, options, told):
    for found in results:
        message = found["refused", options]
        assert told in message and 'pass estimators=("i1",), bounds=False' in message


def test_a_batch_of_other_size_is_skipped(results):
    for found in results:
        kind, message = found["uneven"]
        assert kind == "BatchError" and "must have one size, got [3, 4]" in message


def test_parameters_out_of_reach_are_named(results):
    for found in results:
        kind, message = found["raw"]
        assert kind == "FimprobeError" and "is measured by the rules of its layers" in message
        assert "narrow" in message


def test_a_process_that_fails_alone_stops_probing_not_training(results):
    told = []
    for found in results:
        identical, active, history, messages = found["one fails"]
        assert identical and not active and not history
        told += messages
    assert any("no room" in message for message in told)


def test_fsdp1_is_refused():
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)  # making one takes an accelerator
    wrapped._fsdp_wrapped_module = nn.Linear(2, 2)
    with pytest.raises(FimprobeError, match="FSDP1.*Use FSDP2: torch.distributed.fsdp.fully_shard"):
        fimprobe.attach(nn.Sequential(wrapped), tensorboard=False)
