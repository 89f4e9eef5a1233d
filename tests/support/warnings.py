"""What the package logs."""


def warnings_of(caplog) -> list[str]:
    """The messages that the package logged at the level of warnings or above."""
    return [r.getMessage() for r in caplog.records if r.name == "fimprobe" and r.levelno >= 30]
