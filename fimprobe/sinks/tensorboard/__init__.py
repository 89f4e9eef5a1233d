"""TensorBoard: charts, histograms, pictures and text."""

from fimprobe.sinks.tensorboard.sink import TensorboardSink

__all__ = ["TensorboardSink"]
