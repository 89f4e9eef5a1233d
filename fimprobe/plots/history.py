"""The reports of a run, condensed to what its figures over steps need."""

from __future__ import annotations

from fimprobe.estimators.names import LAYER_KEYS
from fimprobe.report.record import Record

MAX_COLUMNS = 120
"""Reports in the heat map; longer runs are subsampled evenly."""

_KEPT = ("step", "draws", "batch_size", "total", "outputs", "label_sampling", "coverage")
_KEPT_OF_LAYERS = ("rel_error", "one_label_error", "pairs_for_10_percent", "label_variance")


def compact(record: Record) -> Record:
    """Return the part of a record that figures over steps need: a run may have thousands."""
    return {name: record.get(name) for name in _KEPT if name in record} | {
        "layers": {
            name: {
                key: {value: group[key].get(value) for value in _KEPT_OF_LAYERS}
                for key in LAYER_KEYS
                if key in group
            }
            for name, group in record["layers"].items()
        }
    }


class PlotHistory:
    """The condensed reports of a run, at most ``MAX_COLUMNS`` of them, evenly spaced."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._count, self._stride = 0, 1

    def remember(self, record: Record) -> None:
        """Keep the record of a report, or leave it out if the run is long."""
        self._count += 1
        if (self._count - 1) % self._stride:
            return
        self.records.append(compact(record))
        if len(self.records) > MAX_COLUMNS:
            self._stride *= 2
            self.records = self.records[::2]
