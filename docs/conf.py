"""Sphinx's configuration: sphinx-build -W --keep-going docs docs/_build"""

from __future__ import annotations

import logging

import timm_eps

project = "timm-eps"
author = "The timm-eps authors"
version = release = timm_eps.__version__
html_title = f"timm-eps {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False

myst_heading_anchors = 3  # the anchors that GitHub makes of headings
# benchmarks/PRETRAINED.md begins at the third level, since it is also a part of a longer page.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "timm": ("https://huggingface.co/docs/timm/main/en", None),
    "transformers": ("https://huggingface.co/docs/transformers/main/en", None),
}
intersphinx_timeout = 5

# The pages link to files outside docs/, so that the links work in a checkout too. On the site these are pages as well.
PAGES = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changes.md",
    "../benchmarks/RESULTS.md": "results.md",
    "../benchmarks/PRETRAINED.md": "pretrained.md",
    "../benchmarks/INT8.md": "int8.md",
}


class _NoInventory(logging.Filter):
    """Drops the warning that an inventory could not be fetched.

    Without a network the build must pass under -W. The warning has no type that ``suppress_warnings`` could name. Links
    to other projects are then plain text.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "failed to reach any of the inventories" not in str(record.msg)


for name in ("sphinx.ext.intersphinx", "sphinx.ext.intersphinx._load"):
    logging.getLogger(f"sphinx.{name}").addFilter(_NoInventory())


def _link_pages(app, docname, source):
    for path, page in PAGES.items():
        source[0] = source[0].replace(f"]({path}", f"]({page}")


def setup(app):
    app.connect("source-read", _link_pages)
