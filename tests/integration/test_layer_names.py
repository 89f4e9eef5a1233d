"""Names of layers are shown as text in the terminal, in TensorBoard, in figures and in HTML."""

import re

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.cli.commands import main
from fimprobe.sinks.tensorboard.text_pages import about_page, advice_page

plugin_util = pytest.importorskip("tensorboard.plugin_util")

NAMES = [
    "\x1b]0;title\x07x", "\x1b[31mred", "two\nlines", "back\rto the start", "a\u202eb", "a|b|c",
    "<img src=x>", "</svg><script>alert(1)</script>", "&lt;b&gt;", r"$\frac{$", "a$b", r"\$x$",
    "**bold**", "_x_", "`code`", "[text](http://example)", "[red]markup", "tab\there",
    ":smile:", "back\\slash|", "~~gone~~",
]  # fmt: skip


MARKUP = re.compile(r"<(img|script|a|del)\b")


class Net(nn.Module):
    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self._modules |= {name: nn.Linear(4, 4) for name in names}

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def visible(name):
    """The name with its control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def text_of(html):
    from html import unescape

    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize(
    "names", [NAMES[0::3], NAMES[1::3], NAMES[2::3]], ids=["first", "second", "third"]
)
def test_a_name_is_text_everywhere(names, tmp_path, capsys, caplog):
    options, net = {"likelihood": "categorical", "estimators": ["i1"]}, Net(names)
    with fimprobe.attach(net, log_dir=tmp_path, **options) as probe:
        for _ in range(4):
            report = probe.step(torch.randn(6, 4))
    assert caplog.text == ""  # figures too
    page = tmp_path / "page.html"
    assert main(["show", str(tmp_path)]) == main(["show", str(tmp_path), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert not set(shown + str(report)) & set("\x1b\x07\r\t\u202e")
    html = page.read_text()
    assert "<script" not in html and "<img" not in html
    record = report.to_dict()
    advice = plugin_util.markdown_to_safe_html(advice_page(record))
    assert not MARKUP.search(advice)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in advice.split("<tr>")[2:]]
    assert len({len(row) for row in rows}) == 1
    for name in names:
        assert visible(name) in shown and visible(name) in str(report)
        assert visible(name) in text_of(html)
        assert visible(name) in text_of(advice), advice
        assert visible(name) in [text_of(row[0]) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_the_page_about_the_run(name):
    report = fimprobe.measure(
        Net([name, "out"]), torch.randn(6, 4), likelihood="categorical", estimators=["i1"]
    )
    about = plugin_util.markdown_to_safe_html(about_page(report, run={}, tabs=""))
    assert not MARKUP.search(about)
    assert visible(name) in text_of(about), about
