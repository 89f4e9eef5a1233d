"""TensorBoard's event files: one record for each report, with descriptions of new tags."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.histogram import metadata as histogram
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar import metadata as scalar
from tensorboard.plugins.text import metadata as text
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from fimprobe.sinks.appended_file import AppendedFile

FILE_VERSION = "brain.Event:2"
"""Version of the format, which the first record of each event file states."""

_file_numbers = itertools.count()


class EventFile:
    """An event file, to which the values of a report are added and then written as one record.

    Args:
        log_dir: The folder of the file.
        describe: Function that returns the description of a tag; it is stored with the first value.
        purge_step: Readers drop the folder's records of this step and later ones.
    """

    def __init__(
        self, log_dir: Path, describe: Callable[[str], str], *, purge_step: int | None = None
    ) -> None:
        if purge_step is not None:
            _wait_for_new_second(log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        # not TensorBoard's EventFileWriter: its thread prints the traceback of a write that fails
        self._file = AppendedFile(log_dir / _new_name(), new=True)
        self._describe = describe
        self._described: set[str] = set()
        self._record = Summary()
        try:
            self._append(Event(step=purge_step, file_version=FILE_VERSION))
            if purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._append(Event(step=purge_step, session_log=start))
        except BaseException:
            self._file.close()
            raise

    def add_scalar(self, tag: str, value: float) -> None:
        """Add a finite number.

        Args:
            tag: Name of the chart.
            value: The number.
        """
        metadata = self._metadata(tag, scalar.create_summary_metadata)
        self._record.value.add(tag=tag, simple_value=value, metadata=metadata)

    def add_text(self, tag: str, markdown: str) -> None:
        """Add a page of Markdown.

        Args:
            tag: Name of the page.
            markdown: The text.
        """
        tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()])
        tensor.tensor_shape.dim.add(size=1)
        metadata = self._metadata(tag, text.create_summary_metadata)
        self._record.value.add(tag=tag, tensor=tensor, metadata=metadata)

    def add_histogram(self, tag: str, values: np.ndarray, weights: np.ndarray) -> None:
        """Add a histogram of finite values, in 30 bins.

        Args:
            tag: Name of the histogram.
            values: The values [n].
            weights: The count of each value [n].
        """
        counts, edges = np.histogram(values, bins=30, weights=weights)
        rows = np.stack([edges[:-1], edges[1:], counts], axis=1)
        tensor = make_tensor_proto(rows.astype(np.float64))
        metadata = self._metadata(tag, histogram.create_summary_metadata)
        self._record.value.add(tag=tag, tensor=tensor, metadata=metadata)

    def add_image(self, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """Add an image.

        Args:
            tag: Name of the image.
            png: The bytes of the PNG.
            size: (width, height) in pixels.
        """
        picture = Summary.Image(encoded_image_string=png, width=size[0], height=size[1], colorspace=4)
        metadata = self._metadata(tag, image.create_summary_metadata)
        self._record.value.add(tag=tag, image=picture, metadata=metadata)

    def write(self, step: int) -> None:
        """Write the added values as one record, which the system has when this returns."""
        self._append(Event(step=step, summary=self._record))
        self._record = Summary()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

    def _metadata(self, tag: str, make: Callable[..., SummaryMetadata]) -> Any:
        """Return the metadata of a tag with its description; None after its first value."""
        if tag in self._described:
            return None
        self._described.add(tag)
        metadata = make(display_name="", description=self._describe(tag))
        # TensorBoard's fast reader drops descriptions of scalars and images without a class
        metadata.data_class = {"scalars": 1, "images": 3}.get(metadata.plugin_data.plugin_name, 2)
        return metadata


def _new_name() -> str:
    """Return a name that no other file of this process has, and that sorts by time."""
    writer = f"{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
    return f"events.out.tfevents.{int(time.time()):010d}.{writer}"


def _wait_for_new_second(log_dir: Path) -> None:
    """Wait until no file in a folder is named after the current second.

    Names with the same second differ by a counter, and readers sort 10 before 9.
    """
    now = time.time()
    if any(log_dir.glob(f"events.out.tfevents.{int(now):010d}.*")):
        time.sleep(1 - now % 1)


def first_tags(log_dir: Path, prefix: str) -> list[str] | None:
    """Return the tags of the first record with a tag of a prefix; None without such a record.

    Args:
        log_dir: The folder of the event files.
        prefix: Start of the tag.
    """
    for path in sorted(log_dir.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            tags = [value.tag for value in event.summary.value]
            if any(tag.startswith(prefix) for tag in tags):
                return tags
    return None
