"""Builds the documentation: `python -m sphinx -W -b html docs docs/_build`. Needs no network."""

import pathlib
import shutil
import sys

import optcurv

HERE = pathlib.Path(__file__).parent

for made in ("api", "notebooks"):  # what an earlier build left may be out of date
    shutil.rmtree(HERE / made, ignore_errors=True)

# Sphinx reads this folder only.
only_notebooks = shutil.ignore_patterns("*.py", "__pycache__", ".ipynb_checkpoints")
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=only_notebooks)

sys.path.append(str(HERE))
from api_pages import pages  # noqa: E402

(HERE / "api").mkdir()
for name, text in pages().items():
    (HERE / "api" / name).write_text(text)

project = "optcurv"
author = "The optcurv authors"
version = release = optcurv.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]  # the second is what MyST-NB leaves here
templates_path = ["_templates"]

default_role = "py:obj"  # `optcurv.pal` in a docstring becomes a link
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the descriptions say what an argument may be, shorter than the annotations do
napoleon_attr_annotations = False
napoleon_use_ivar = True  # attributes as a list, like arguments
napoleon_use_rtype = False

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # `!` and `%` in the notebooks' cells for Colab
nb_execution_mode = "off"  # the notebooks are stored with their outputs, and tests/test_notebooks.py runs them

html_theme = "sphinx_book_theme"
html_title = f"optcurv {version}"
html_theme_options = {
    "repository_url": "https://github.com/optcurv/optcurv",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_navbar_depth": 1,
}
