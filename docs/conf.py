"""Configuration of Sphinx: ``sphinx-build -W --keep-going docs DIRECTORY`` builds the pages.

The pages are Markdown that is complete without a build. The build adds the docstrings to
``reference/`` and checks every link and every reference in the public docstrings.
"""

import re
from pathlib import Path

import fimprobe

project = "fimprobe"
author = "fimprobe developers"
release = fimprobe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"fimprobe {release}"
html_copy_source = False
html_show_copyright = False

toc_object_entries_show_parents = "hide"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

# A reference to a name of fimprobe must resolve. Names of other packages stay plain text.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fimprobe\b).*")]
nitpick_ignore = [  # internal types in the signatures of what adapters use
    ("py:class", "fimprobe.distributed.processes.T"),
    ("py:class", "fimprobe.engines.tracing.batch_layout.BatchLayouts"),
    ("py:class", "fimprobe.engines.tracing.spot_history.SpotHistory"),
    ("py:class", "fimprobe.fisher.records.FisherRecord"),
    ("py:class", "fimprobe.jacobian_bounds.layer_bound.LayerBound"),
    ("py:class", "fimprobe.model.input_roles.InputRoles"),
    ("py:class", "fimprobe.model.twin.TwinSettings"),
    ("py:class", "fimprobe.statistics.Measured"),
    ("py:class", "fimprobe.training.schedule.Schedule"),
]

TOP = Path(__file__).parents[1]
TOP_LEVEL_PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages of ``docs/`` that refer to a file at the top of the repository, which the build shows."""


def show_top_level_page(app, name, source):
    """Replace the reference by the file, with links that start at ``docs/``."""
    if name in TOP_LEVEL_PAGES:
        text = (TOP / TOP_LEVEL_PAGES[name]).read_text(encoding="utf-8")
        links = re.sub(r"\]\((?!#|docs/|[a-z]+:)", "](../", text)
        links = links.replace("](../CHANGELOG.md", "](changelog.md")
        source[0] = links.replace("](docs/", "](")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", show_top_level_page)
