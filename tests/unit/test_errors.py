"""Errors are raised, or logged once each."""

import pytest

from fimprobe import FimprobeError
from fimprobe.errors import ErrorHandler


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
