"""Files of several writers, links, forks and full disks: nothing written is lost."""

import json
import os
import re
import resource
import sys
import threading

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from fimprobe.errors import ErrorHandler
from fimprobe.report.report import shared_record
from fimprobe.sinks.folder_lock import FolderLock
from fimprobe.sinks.jsonl import JsonlSink
from fimprobe.sinks.sink_group import SinkGroup
from tests.support.reports import build_report

PRECIOUS = "a thesis\n"


def steps(path):
    return [r["step"] for r in map(json.loads, path.read_text().splitlines()) if "step" in r]


def write_steps(path, *numbers, **options):
    sink = JsonlSink(path, run=lambda: {"model": "M"}, **options)
    for step in numbers:
        sink.write(build_report(2, step))
    sink.close()


def in_a_fork(action):
    """The text that ``action`` returns in a forked process."""
    end, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(action())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(start, text.encode())
        os._exit(0)
    os.close(start)
    os.waitpid(pid, 0)
    return os.read(end, 10_000).decode()


def test_a_torn_line_does_not_swallow_the_next_run(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    write_steps(path, 0, 1)
    path.write_text(path.read_text()[:-30])
    write_steps(path, 2)
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[3])["run"]["first_step"] == 2


def test_what_follows_a_torn_line_is_kept_when_a_training_resumes(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    write_steps(path, 0, 1)
    path.write_text(path.read_text()[:-30])
    write_steps(path, 2, 3)
    write_steps(path, 3, purge_step=3)
    assert steps(path) == [0, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fimprobe.jsonl"]


@pytest.mark.parametrize("way", ["path", "link", "hard link", "relative"])
def test_two_writers_of_a_record_are_refused(tmp_path, way, monkeypatch):
    path = tmp_path / "fimprobe.jsonl"
    monkeypatch.chdir(tmp_path)
    first = JsonlSink(path)
    other = {"path": path, "relative": "fimprobe.jsonl"}.get(way, tmp_path / "other")
    if way == "link":
        other.symlink_to(path)
    elif way == "hard link":
        os.link(path, other)
    with pytest.raises(FimprobeError, match="`jsonl` must be a file of its own"):
        JsonlSink(other)
    first.close()
    JsonlSink(other).close()


def test_a_resumed_training_takes_the_record_from_the_one_that_was_left(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    left = JsonlSink(path)
    left.write(build_report(2, 0))
    resumed = JsonlSink(path, purge_step=1)
    with pytest.raises(FimprobeError, match="writes to this file now"):
        left.write(build_report(2, 1))
    left.close()
    resumed.write(build_report(2, 1))
    with pytest.raises(FimprobeError, match="of its own"):  # the file is another one now
        JsonlSink(path)
    resumed.close()
    assert steps(path) == [0, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_fork_does_not_write_and_holds_nothing(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    sink, lock = JsonlSink(path), FolderLock(tmp_path)
    assert "writes to this file now" in in_a_fork(lambda: sink.write(build_report(2, 0)))
    assert f"process {os.getpid()}" in in_a_fork(lambda: FolderLock(tmp_path))
    assert "of its own" in in_a_fork(lambda: JsonlSink(path))
    assert in_a_fork(lambda: (lock.held, lock.release(), sink.close())) == "(False, None, None)"
    assert lock.held and "of its own" in in_a_fork(lambda: FolderLock(tmp_path))
    sink.write(build_report(2, 1))
    sink.close()
    lock.release()
    assert steps(path) == [1]


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_no_file_is_overwritten_through_a_lock(tmp_path, kind):
    target, folder = tmp_path / "thesis.tex", tmp_path / "run"
    folder.mkdir()
    if kind != "dangling link":
        target.write_text(PRECIOUS)
    link = folder / "fimprobe.lock"
    os.link(target, link) if kind == "hard link" else link.symlink_to(target)
    if kind == "hard link":
        FolderLock(folder).release()
    else:
        with pytest.raises(FimprobeError, match="is a link. Remove it"):
            FolderLock(folder)
    assert target.exists() == (kind != "dangling link")
    assert not target.exists() or target.read_text() == PRECIOUS


def test_no_file_is_overwritten_when_a_training_resumes(tmp_path):
    target, record = tmp_path / "thesis.tex", tmp_path / "disk" / "fimprobe.jsonl"
    target.write_text(PRECIOUS * 2)
    with pytest.raises(FimprobeError, match="which has no report"):
        JsonlSink(target, purge_step=3)
    assert target.read_text() == PRECIOUS * 2
    write_steps(record, 0, 1)
    whole = record.read_text()
    path = tmp_path / "run" / "fimprobe.jsonl"
    path.parent.mkdir()
    path.symlink_to(record)
    write_steps(path, 1, purge_step=1)
    assert record.read_text() == whole and steps(path) == [0, 1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["fimprobe.jsonl"]


def test_a_pipe_does_not_stop_the_training(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FimprobeError, match="which is a pipe"):
        JsonlSink(tmp_path / "pipe")


def test_a_record_that_cannot_be_resumed_stays_and_is_not_locked(tmp_path, monkeypatch):
    path = tmp_path / "fimprobe.jsonl"
    write_steps(path, 0, 1)
    whole = path.read_text()

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("fimprobe.sinks.jsonl.shutil.copymode", fail)
        with pytest.raises(OSError, match="disk full"):
            JsonlSink(path, purge_step=1)
    assert path.read_text() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fimprobe.jsonl"]
    JsonlSink(path).close()


class Failing:
    def __init__(self, closed):
        self.closed = closed

    def write(self, report):
        raise OSError("disk full")

    def close(self):
        self.closed.append(self)
        raise OSError("disk full still")


def test_a_dropped_sink_is_closed_without_a_second_warning():
    errors, closed = ErrorHandler(raises=False), []
    group = SinkGroup([Failing(closed), Failing(closed)], errors)
    group.write(build_report(2, 0))
    group.close()
    assert len(set(map(id, closed))) == 2 and errors.warned == {"Failing failed: disk full"}


def test_every_sink_is_closed_though_one_raises():
    closed = []
    group = SinkGroup([Failing(closed), Failing(closed)], ErrorHandler(raises=True))
    with pytest.raises(FimprobeError, match="could not be closed"):
        group.close()
    assert len(set(map(id, closed))) == 2


def test_a_folder_is_free_after_its_files_failed(tmp_path, monkeypatch, caplog):
    def train():
        options = {"likelihood": "categorical", "estimators": ["i1"], "log_dir": tmp_path}
        net = nn.Linear(3, 2)
        with fimprobe.attach(net, **options) as probe:
            probe.step(torch.randn(4, 3))
        return probe.log_dir

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("fimprobe.sinks.tensorboard.event_file.EventFile.write", fail)
        patch.setattr("fimprobe.sinks.tensorboard.event_file.EventFile.close", fail)
        train()
        assert caplog.text.count("TensorboardSink failed: disk full") == 1
    assert train() == tmp_path
    assert "another probe" not in caplog.text


def test_a_full_disk_is_one_sentence_from_the_first_byte_on(tmp_path, caplog):
    def train():
        sys.stderr = (tmp_path / "stderr").open("w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        num_threads, net = threading.active_count(), nn.Linear(3, 2)
        with fimprobe.attach(net, likelihood="gaussian", log_dir=tmp_path / "a") as probe:
            assert probe.step(torch.randn(4, 3)) is not None
            assert threading.active_count() == num_threads  # whose error Python would print
        return "; ".join(record.getMessage() for record in caplog.records)

    told = in_a_fork(train)
    assert re.fullmatch(r"fimprobe: tensorboard log_dir=\S+ cannot be written .*File too large", told)
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_damaged_step_is_no_step_when_a_training_resumes(tmp_path):
    path = tmp_path / "fimprobe.jsonl"
    write_steps(path, 0, 1)
    path.write_text(
        path.read_text() + '{"step": Infinity}\n{"step": NaN}\n{"step": null}\n{"run": 1}\n'
    )
    write_steps(path, 2, purge_step=2)
    assert steps(path) == [0, 1, 2]


def test_sinks_share_one_record_and_readers_have_their_own():
    report = build_report(2, 0)
    shared = shared_record(report)
    assert shared_record(report) is shared and shared == report.to_dict()
    own = report.to_dict()
    own["layers"].clear()
    own["notes"].append("changed")
    own["total"]["i1"]["unknown"]["trace"] = "changed"
    assert shared_record(report) == shared == report.to_dict() != own
    assert shared_record(build_report(2, 1))["step"] == 1
