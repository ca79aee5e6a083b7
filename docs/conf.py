"""Pages of docs/, README.md and the API as HTML: `make docs`."""

import re
from importlib.metadata import version
from typing import Any

project = "tokred"
author = "the tokred developers"
release = version("tokred")
del version  # Sphinx reads a setting of this name
html_theme = "furo"
html_title = f"tokred {release}"
exclude_patterns = ["_build"]

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]

apidoc_modules = [
    {"path": "../tokred", "destination": "api", "separate_modules": False, "max_depth": 2}
]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "ignore-module-all": True}


def plain_signs(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write [*B N D] and |x|: outside of code these are no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([*|])", r"\\\1", p) for p in parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_signs, priority=1)
