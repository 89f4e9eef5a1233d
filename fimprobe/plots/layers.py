"""The layers that figures with one row for each show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fimprobe.report.layer_names import label_layers
from fimprobe.report.record import Record, rank_layers

MAX_ROWS = 30
"""Layers in a figure with one row for each: more names would overlap."""


def shown_layers(record: Record) -> list[tuple[str, Record]]:
    """Return the ``MAX_ROWS`` layers that need the most inputs, in the order of the model."""
    chosen = {name for name, _ in rank_layers(record, MAX_ROWS)}
    return [(name, group) for name, group in record["layers"].items() if name in chosen]


def label_rows(record: Record, layers: Sequence[tuple[str, Record]]) -> list[str]:
    """Return short names.

    Args:
        record: The record of a report.
        layers: Names and records of some layers.
    """
    labels = label_layers(record)
    return [labels[name] for name, _ in layers]


def read_layers(layers: Sequence[tuple[str, Record]], key: str, field: str) -> np.ndarray:
    """Return a value of every layer, NaN where it is unknown [layers].

    Args:
        layers: Names and records of some layers.
        key: The estimator.
        field: The name of the value.
    """
    return np.array([group.get(key, {}).get(field) for _, group in layers], dtype=float)
