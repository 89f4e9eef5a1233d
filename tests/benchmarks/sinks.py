"""What writing a report to TensorBoard takes: time of a report, of its pictures, bytes on disk.

Prints figures; nothing is asserted. ``python tests/benchmarks/sinks.py``
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))
from fimprobe.plots.gallery import make_figures  # noqa: E402
from fimprobe.plots.history import PlotHistory  # noqa: E402
from fimprobe.plots.style import to_png  # noqa: E402
from fimprobe.sinks.tensorboard.sink import TensorboardSink  # noqa: E402
from fimprobe.sinks.tensorboard.tags import make_scalars  # noqa: E402
from tests.support.reports import build_report  # noqa: E402


def draw(album, report):
    for picture in make_figures(album.records, report.to_dict()):
        to_png(picture.figure, picture.title)


def main():
    """Runs of 12, 100 and 300 layers, each layer charted (4 values), 64 reports."""
    print("layers  charted  tags  first ms  median ms  KB a report  pictures ms")
    for layers, top in ((12, 12), (100, 12), (300, 12), (300, 300)):
        reports = [build_report(layers, 10 * i) for i in range(64)]
        with tempfile.TemporaryDirectory() as folder:
            sink = TensorboardSink(folder, top=top, figures=False)
            times, sizes = [], []
            for report in reports:
                started = time.perf_counter()
                sink.write(report)
                times.append(1000 * (time.perf_counter() - started))
                sizes.append(sum(p.stat().st_size for p in Path(folder).rglob("events*")))
            runs = make_scalars(report, report.to_dict(), sink.layers)
            tags = len({tag for values in runs.values() for tag in values})
            sink.close()
        album = PlotHistory()
        for report in reports:
            album.remember(report.to_dict())
        draw(album, reports[-1])
        started = time.perf_counter()
        draw(album, reports[-1])
        drawn = 1000 * (time.perf_counter() - started)
        each = (sizes[-1] - sizes[0]) / 1000 / (len(sizes) - 1)
        print(
            f"{layers:6}  {top:7}  {tags:4}  {times[0]:8.1f}  {median(times):9.1f}  {each:11.1f}"
            f"  {drawn:11.0f}"
        )


if __name__ == "__main__":
    main()
