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


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self._modules[name] = nn.Linear(4, 5)
        self._modules["out"] = nn.Linear(5, 3)
        self.name = name

    def forward(self, x):
        return self._modules["out"](torch.tanh(self._modules[self.name](x)))


def visible(name):
    """The name with its control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def text_of(html):
    from html import unescape

    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_everywhere(name, tmp_path, capsys, caplog):
    options, net = {"likelihood": "categorical", "estimators": ["i1"]}, Net(name)
    with fimprobe.attach(net, log_dir=tmp_path, **options) as probe:
        for _ in range(4):
            report = probe.step(torch.randn(6, 4))
    assert caplog.text == ""  # figures too
    page = tmp_path / "page.html"
    assert main(["show", str(tmp_path)]) == main(["show", str(tmp_path), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert visible(name) in shown and visible(name) in str(report)
    assert not set(shown + str(report)) & set("\x1b\x07\r\t\u202e")
    html = page.read_text()
    assert "<script" not in html and "<img" not in html
    assert visible(name) in text_of(html)
    record = report.to_dict()
    about = about_page(report, run={}, tabs="")
    for markdown in (advice_page(record), about):
        rendered = plugin_util.markdown_to_safe_html(markdown)
        assert visible(name) in text_of(rendered), rendered
        assert not re.search(r"<(img|script|a|del)\b", rendered)
    table = plugin_util.markdown_to_safe_html(advice_page(record))
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in table.split("<tr>")[2:]]
    assert visible(name) in [text_of(row[0]) for row in rows]
    assert len({len(row) for row in rows}) == 1
