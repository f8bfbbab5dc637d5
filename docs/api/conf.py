"""The reference of the Python interface, from the docstrings: python -m sphinx -W -n docs/api build/api"""

from __future__ import annotations

import psa_diffusers

project = "psa_diffusers"
author = "the authors of psa_diffusers"
release = version = psa_diffusers.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"psa_diffusers {release}"
html_copy_source = html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# "query, key:" documents two arguments, which a list of parameters cannot; so "Args" and "Attributes" are plain lists.
napoleon_use_param = False
napoleon_use_ivar = False

# What is not documented here: other packages (their pages would need a network), and types that go unnamed.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|diffusers|matplotlib|nn|collections|pathlib|typing)\..*"),
    ("py:class", r"Tensor|Figure|Path|optional"),
]


def setup(app) -> None:
    app.connect("autodoc-process-signature", _without_factory)


def _without_factory(app, what, name, obj, options, signature, returns):
    """Of a dataclass: ``<factory>`` is no Python."""
    return (signature or "").replace("<factory>", "...") or None, returns
