"""Errors are raised, or logged once each."""

import pytest

from fimprobe import FimprobeError
from fimprobe.errors import ErrorHandler, guarded


def fail():
    raise OSError("disk full")


def test_every_warning_is_logged_once(caplog):
    errors = ErrorHandler(raises=False)
    assert not errors.run_safely(fail, "no file") and not errors.run_safely(fail, "no file")
    assert not errors.run_safely(fail, "no file there", key="no file: disk full")
    assert errors.run_safely(list, "never")
    assert [r.getMessage() for r in caplog.records] == ["fimprobe: no file: disk full"]


def test_errors_are_raised_on_request(caplog):
    with pytest.raises(FimprobeError, match="no file: disk full") as error:
        ErrorHandler(raises=True).run_safely(fail, "no file")
    assert isinstance(error.value.__cause__, OSError) and not caplog.records


@pytest.mark.parametrize("raises", [False, True])
def test_a_guard_raises_mistakes_where_it_is_to(raises, caplog):
    class Callback:
        def __init__(self):
            self.errors = ErrorHandler(raises=raises)

        @guarded(defers=False, raises_mistakes=True)
        def begin(self, error):
            raise error

    callback = Callback()
    with pytest.raises(FimprobeError, match="an argument"):
        callback.begin(FimprobeError("an argument"))
    assert not callback.errors.ended
    if raises:
        with pytest.raises(RuntimeError, match="a bug"):
            callback.begin(RuntimeError("a bug"))
    else:
        assert callback.begin(RuntimeError("a bug")) is None
        assert callback.errors.end_reason == (
            "probing ended, training continues: RuntimeError: a bug"
        )
        assert len(caplog.records) == 1
