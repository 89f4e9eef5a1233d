"""What a browser shows of a run: the error first, pictures, text, without an error of its own."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

from fimprobe.sinks.tensorboard.sink import TensorboardSink  # noqa: E402
from tests.support.reports import build_report  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1400,3000",
)  # fmt: skip

FIND = """
function all(root, wanted) {
  const found = [];
  (function walk(node) {
    for (const child of node.children) {
      if (child.matches(wanted)) found.push(child);
      if (child.shadowRoot) walk(child.shadowRoot);
      walk(child);
    }
  })(root.shadowRoot || root);
  return found;
}
let found = [document.body];
for (const wanted of arguments[0]) found = found.flatMap(e => all(e, wanted));
"""
"""Elements inside of elements inside of ..., also in shadow roots, in the order of the page."""


def ask(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """TensorBoard on loopback, serving a run of 5 layers and 8 reports."""
    log_dir = tmp_path_factory.mktemp("served")
    sink = TensorboardSink(log_dir / "net")
    for i in range(8):
        sink.write(build_report(5, 1000 * i))
    sink.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*argv, "--host", "127.0.0.1"], **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                if len(ask(f"{url}/data/plugin/images/tags").get("net", {})) == 10:
                    break
            except OSError:
                pass
            time.sleep(0.25)
        else:
            process.terminate()
            pytest.fail("TensorBoard did not serve the run within 30 s")
        yield url
        process.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def query(browser, *path, value="e.textContent.trim()"):
    """A value of each element that ``path`` leads to."""
    return browser.execute_script(FIND + f"return found.map(e => {value})", path)


def open_tab(browser, server, tab, path, value, done):
    """Values of the elements of a tab, as soon as ``done`` holds for them, or after 15 s."""
    browser.get("about:blank")
    browser.get(f"{server}/#{tab}")
    until = time.monotonic() + 15
    found = []
    while not done(found) and time.monotonic() < until:
        time.sleep(0.25)
        found = query(browser, *path, value=value)
    return found


def test_the_first_chart_is_the_error_with_a_line_for_each_estimator(browser, server):
    cards = open_tab(
        browser,
        server,
        "timeseries",
        ["scalar-card"],
        "e.textContent",
        lambda texts: len(texts) > 5 and all("net/i2" in text for text in texts[:2]),
    )
    tags = ["fim/error_of_this_report", "fim/error_with_1_label", "fim/log10_input_variance"]
    assert [next(tag for tag in tags if tag in text) for text in cards[:3]] == tags
    assert all("net/i1" in text and "net/i2" in text for text in cards[:2])
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert not [e for e in errors if "favicon" not in e]


def test_pictures_and_text_are_shown(browser, server):
    path, value = ["tf-image-loader", "img"], "e.naturalWidth"
    widths = open_tab(browser, server, "images", path, value, lambda n: len(n) == 10 and all(n))
    assert widths == [700] * 10
    path, value = ["tf-markdown-view"], "(e.shadowRoot || e).textContent"
    texts = open_tab(browser, server, "text", path, value, lambda n: "Step 7000" in "".join(n))
    told = "".join(texts)
    assert "About this run" in told and "(input, label) pair" in told and "Step 7000" in told


@pytest.mark.parametrize("plugin", ["scalars", "images", "histograms"])
def test_descriptions_reach_the_reader(server, plugin):
    runs = ask(f"{server}/data/plugin/{plugin}/tags")
    tags = {(run, tag): entry for run, tags in runs.items() for tag, entry in tags.items()}
    assert tags
    for tag, entry in tags.items():
        assert len(entry["description"]) > 20, tag
