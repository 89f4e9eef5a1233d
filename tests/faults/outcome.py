"""What became of injected faults, and the table of all."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """Of one kind of fault.

    Attributes:
        kind: What was injected, in words.
        injected: How many times.
        survived: How often the training was what it is without the probe.
        told_once: How often the user was told once; None where nothing is to be told.
        problems: What went wrong, a line for each.
        note: A figure to show, such as the growth of memory.
    """

    kind: str
    injected: int = 0
    survived: int = 0
    told_once: int | None = 0
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def count(self, name: str, faults: list[str], *, told: bool | None = True) -> None:
        """Count one injection, which survived if there are no faults."""
        self.injected += 1
        self.survived += not faults
        if self.told_once is not None and told is not None:
            self.told_once += told
        self.problems += [f"{self.kind}, {name}: {fault}" for fault in faults]


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as text, with their problems below."""
    rows = [("fault", "injected", "survived", "told once", "")]
    for x in outcomes:
        told = "-" if x.told_once is None else str(x.told_once)
        rows.append((x.kind, str(x.injected), str(x.survived), told, x.note))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, *(problem for x in outcomes for problem in x.problems)])
