"""The sinks of one probe: files are opened as configured, and one that fails is dropped."""

import pytest

from fimprobe import Config, FimprobeError
from fimprobe.errors import ErrorHandler
from fimprobe.sinks.sink_group import SinkGroup
from tests.support.reports import build_report


class Recorder:
    """Stores steps; fails if asked to."""

    def __init__(self, *, fails=False):
        self.fails, self.steps, self.closed = fails, [], False

    def write(self, report):
        if self.fails:
            raise OSError("disk full")
        self.steps.append(report.step)

    def close(self):
        self.closed = True


def opened(group, config, charts, **options):
    return group.open_files(
        config,
        open_tensorboard=charts,
        describe_run=dict,
        purge_step=options.get("purge_step"),
    )


def test_a_failing_sink_is_dropped_with_one_warning():
    errors = ErrorHandler(raises=False)
    good, bad = Recorder(), Recorder(fails=True)
    group = SinkGroup([bad, good], errors)
    for step in range(3):
        group.write(build_report(2, step))
    group.close()
    assert [r.step for r in group.memory.reports] == good.steps == [0, 1, 2]
    assert errors.warned == {"Recorder failed: disk full"}
    assert good.closed and bad.closed  # it keeps no file, thread or lock


def test_a_failing_sink_raises_on_request():
    group = SinkGroup([Recorder(fails=True)], ErrorHandler(raises=True))
    with pytest.raises(FimprobeError, match="Recorder failed: disk full"):
        group.write(build_report(2, 0))


def test_charts_and_lines_share_the_folder_of_the_configuration(tmp_path):
    charts = []

    def open_tensorboard(log_dir, settings):
        charts.append((log_dir, settings.figures))
        return Recorder()

    config = Config(tensorboard={"log_dir": str(tmp_path), "figures": False})
    group = SinkGroup(None, ErrorHandler(raises=True))
    assert opened(group, config, open_tensorboard) == tmp_path
    group.write(build_report(2, 5))
    group.close()
    assert charts == [(tmp_path, False)]
    assert (tmp_path / "fimprobe.jsonl").read_text().count("\n") == 2  # the run, and its report


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"tensorboard": False}, []),
        ({"tensorboard": False, "jsonl": "own.jsonl"}, ["own.jsonl"]),
        ({"jsonl": False}, []),
    ],
)
def test_only_what_is_configured_is_opened(options, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = SinkGroup(None, ErrorHandler(raises=True))
    folder = opened(group, Config(**options), lambda log_dir, settings: Recorder())
    assert (folder is None) == (options.get("tensorboard") is False)
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    group.close()


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    errors = ErrorHandler(raises=False)
    group = SinkGroup(None, errors)

    def fail(log_dir, settings):
        raise OSError("not a directory")

    config = Config(tensorboard={"log_dir": str(tmp_path / "file" / "run")})
    assert opened(group, config, fail) is None
    assert errors.warned == {"log_dir"} and group.sinks == [group.memory]


def test_lines_without_charts_lock_the_folder_until_they_are_closed(tmp_path):
    def fail(log_dir, settings):
        raise OSError("no tensorboard")

    config = Config(tensorboard={"log_dir": str(tmp_path)})
    first, second, third = (SinkGroup(None, ErrorHandler(raises=False)) for _ in range(3))
    opened(first, config, fail)
    opened(second, config, fail)
    assert len(first.sinks) == 2 and len(second.sinks) == 1
    first.close()
    opened(third, config, fail)
    assert len(third.sinks) == 2
    third.close()
