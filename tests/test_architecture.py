"""Rooms with walls: which folder of the library may import which, and what it may import from outside."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import optcurv

PACKAGE = pathlib.Path(optcurv.__file__).parent
HALL, FACE = "the hall", "__init__"
MAY_IMPORT = {
    HALL: {HALL},
    "kronecker": {HALL, "kronecker"},
    "landscape": {HALL, "kronecker", "landscape"},
    "methods": {HALL, "kronecker", "methods"},
    FACE: {HALL, "kronecker", "landscape", "methods"},
}
THIRD_PARTY = {"chex", "jax", "optax"}
ON_FIRST_USE = {"curvature.py": {"flax"}, "landscape/plots.py": {"matplotlib", "mpl_toolkits"}}  # inside functions
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
every_file = pytest.mark.parametrize("name", FILES)


def room_of(name):
    """The room of a file such as `methods/edf.py`, or of a module such as `methods.edf`."""
    first, *rest = name.removesuffix(".py").replace("/", ".").split(".")
    return first if rest else FACE if first == FACE else HALL


def imports(path, at_once=False):
    """The modules that a file names; `at_once`: those that Python imports together with the file."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        later = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_once and later):
            waiting.extend(ast.iter_child_nodes(node))


@every_file
def test_walls(name):
    room = room_of(name)
    assert room in MAY_IMPORT, f"{name} lies in a new folder: say in MAY_IMPORT which rooms it may import."
    for module in imports(FILES[name]):
        package, _, inner = module.partition(".")
        if package == "optcurv":
            assert room_of(inner) in MAY_IMPORT[room], (
                f"{name} imports {module}, but {room} may import {sorted(MAY_IMPORT[room])} only: move what both need "
                "to the hall, or pass it as an argument."
            )
        else:
            allowed = THIRD_PARTY | ON_FIRST_USE.get(name, set()) | sys.stdlib_module_names
            assert package in allowed, f"{name} imports {package}: the library depends on {sorted(THIRD_PARTY)} alone."


@pytest.mark.parametrize("name", ON_FIRST_USE)
def test_what_few_need_is_imported_on_first_use(name):
    for module in imports(FILES[name], at_once=True):
        assert module.partition(".")[0] not in ON_FIRST_USE[name], (
            f"{name}: import {module} inside the function using it."
        )


def test_no_module_imports_itself_by_way_of_others():
    modules = {name.removesuffix(".py").replace("/", "."): path for name, path in FILES.items()}
    arrows = {
        name: {module.removeprefix("optcurv.") for module in imports(path)} & modules.keys()
        for name, path in modules.items()
    }
    while leaves := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"These import each other in a circle: {sorted(arrows)}."


@every_file
def test_only_public_jax_is_used(name):
    for module in imports(FILES[name]):
        assert not module.startswith(("jax._src", "jax.experimental", "optax._src"))


@every_file
def test_files_and_functions_fit_their_frames(name):
    source = FILES[name].read_text()
    assert len(source.splitlines()) <= 400, f"{name} has more than 400 lines: is it still one thing?"
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    too_long = [f"{function.name} ({length_of(function)})" for function in functions if length_of(function) > 60]
    assert not too_long, f"{name} has functions of more than 60 lines beside their docstrings: {too_long}. Cut them."


def length_of(function):
    """The lines of a function from `def` on, with those of functions inside it, but without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_import_pulls_in_no_flax_and_no_matplotlib():
    program = "import sys, optcurv; print(sorted({'flax', 'matplotlib', 'scipy.sparse.linalg'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "flax" not in loaded
    assert "matplotlib" not in loaded


def test_every_public_function_is_documented_with_an_example():
    functions = [name for name in optcurv.__all__ if inspect.isfunction(getattr(optcurv, name))]
    assert len(functions) > 50
    for name in functions:
        assert ">>>" in getattr(optcurv, name).__doc__, name


def test_types_that_public_signatures_name_are_public():
    """So that users can write annotations, solvers and norms of their own without reaching into modules."""
    library = {
        node.name if isinstance(node, ast.ClassDef) else node.target.id
        for path in FILES.values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.AnnAssign)
    }
    for name in optcurv.__all__:
        public = getattr(optcurv, name)
        if inspect.isfunction(public):
            (function,) = ast.parse(inspect.getsource(public)).body
            arguments = [*function.args.args, *function.args.kwonlyargs]
            named = {
                node.id
                for annotation in (*(argument.annotation for argument in arguments), function.returns)
                for node in ast.walk(annotation)
                if isinstance(node, ast.Name)
            }
            assert named & library <= set(optcurv.__all__), f"{name} names {named & library - set(optcurv.__all__)}."
