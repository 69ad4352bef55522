"""Configuration of the documentation: `make docs`. Everything, mathematics included, works without a network."""

import patchflow

project = "patchflow"
author = "The patchflow developers"
copyright = "2026, the patchflow developers"  # noqa: A001
version = release = patchflow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "patchflow"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True
