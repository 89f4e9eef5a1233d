"""What a run's pictures over steps need, kept small; drawing is the gallery's."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
"""A report as ``to_dict`` gives it, or as it is read back from a file."""

MOST_COLUMNS = 120
"""Reports in the heat map; of longer runs they are taken evenly."""


def compact(record: Record) -> Record:
    """What of a record the pictures over steps need: a run may hold thousands."""
    values = ("rel_error", "one_label_error", "pairs_for_10_percent")
    kept = ("step", "draws", "batch_size", "total", "outputs", "label_sampling")
    return {name: record.get(name) for name in kept} | {
        "layers": {
            name: {
                kind: {value: group[kind][value] for value in values}
                for kind in ("i1", "i2")
                if kind in group
            }
            for name, group in record["layers"].items()
        }
    }


class PlotHistory:
    """Remembers a run, condensed, of long ones evenly taken reports only."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._seen, self._stride = 0, 1

    def remember(self, record: Record) -> None:
        """Keep a report."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self.records.append(compact(record))
        if len(self.records) > MOST_COLUMNS:
            self._stride *= 2
            self.records = self.records[::2]
