"""The site of the documents: ``make docs``. Needs no network; the extra is ``pyablate[docs]``."""

from __future__ import annotations

import os
from importlib import metadata

project = "pyablate"
author = "The pyablate contributors"
copyright = author
release = version = metadata.version("pyablate")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_nb", "numpydoc"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
root_doc = "index"

# Pages are read on code hosts too: plain Markdown wherever that does.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Notebooks are stored without what they print and run while the site is built; what has not changed
# comes from the cache.
nb_execution_mode = "cache"
nb_execution_cache_path = os.path.join(os.path.dirname(__file__), "_build", "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 3600  # a machine may be busy
nb_merge_streams = True

nitpicky = True  # names in docstrings lead somewhere
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and units
numpydoc_show_class_members = False
numpydoc_validation_checks = set()

html_theme = "furo"
html_title = f"pyablate {release}"
html_static_path: list[str] = []
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
