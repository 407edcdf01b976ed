"""Writes the API pages: every public name under its module, every module under its folder."""

import ast
import importlib
import inspect
import pathlib
from collections.abc import Iterator

import optcurv

TITLES = {
    "methods": "Methods",
    "kronecker": "Kronecker factors",
    "landscape": "The loss landscape",
    "shared": "Losses, products and helpers",
}


def public_names() -> dict[str, list[str]]:
    """Returns the public names of each module, in the order in which `optcurv/__init__.py` imports them."""
    face = ast.parse(pathlib.Path(optcurv.__file__).read_text())
    imports = [node for node in ast.walk(face) if isinstance(node, ast.ImportFrom)]
    return {str(node.module): [alias.name for alias in node.names] for node in imports}


def pages() -> dict[str, str]:
    """Returns the pages, by the names of their files."""
    texts = {room: f"# {title}\n" for room, title in TITLES.items()}
    for module, names in public_names().items():
        _, *folders, _ = module.split(".")
        texts[folders[0] if folders else "shared"] += f"\n## `{module}`\n\n" + "\n".join(_section(module, names))
    contents = "\n".join(TITLES)
    texts["index"] = f"# API\n\nEverything public is in the namespace `optcurv`.\n\n```{{toctree}}\n{contents}\n```\n"
    return {f"{room}.md": text for room, text in texts.items()}


def _section(module: str, names: list[str]) -> Iterator[str]:
    """Yields the lines on one module: what it is for, its public names, and the types that they return."""
    from sphinx.pycode import ModuleAnalyzer  # the tests read this file without Sphinx

    summary, _, _ = inspect.cleandoc(importlib.import_module(module).__doc__ or "").partition("\n\n")
    yield from ("```{eval-rst}", ".. currentmodule:: optcurv", "", summary, "")
    yield from (".. autosummary::", "   :toctree: generated", "   :nosignatures:", "")
    data = ModuleAnalyzer.for_module(module).find_attr_docs()
    yield from (f"   {name}" for name in names if ("", name) not in data)
    yield from (f"   ~{module.removeprefix('optcurv.')}.{name}" for name in _returned_types(module))
    for name in (name for name in names if ("", name) in data):
        yield from ("", f".. py:data:: {name}", "", *(f"   {line}" for line in data["", name]))
    yield "```\n"


def _returned_types(module: str) -> list[str]:
    """The documented tuples of a module that are not public themselves, without the states of optimisers."""
    own = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return [
        name
        for name, kind in own
        if kind.__module__ == module
        and (name.endswith("Info") or "Attributes:" in (kind.__doc__ or ""))
        and not name.startswith("_")
        and not name.endswith("State")
        and name not in optcurv.__all__
    ]
