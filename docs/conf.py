"""How the documentation is built: offline, every warning an error (`make docs`)."""

from __future__ import annotations

import importlib.metadata

project = "asyncxfer"
author = "The asyncxfer authors"
copyright = "The asyncxfer authors, Apache-2.0"
release = version = importlib.metadata.version("asyncxfer")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = False
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False  # numpydoc brings it along
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"asyncxfer {release}"
html_copy_source = False
html_show_sphinx = False
