"""A file imports only from floors below its own, and the package pulls in nothing it does not need."""

import ast
import pathlib
import subprocess
import sys

import pytest

import optcurv

FLOORS = [
    {"arguments", "jaxpr", "losses"},
    {"devices", "spikes"},
    {"curvature", "labels", "quadratic", "switching", "taps"},
    {"accumulation", "krylov", "kronecker", "shapes"},
    {"edf", "pal", "trust_region", "tso_alra", "runge_kutta", "masking", "diagnostics"}
    | {"comparisons", "hessian_mass", "spectra", "surface"},
    {"__init__"},
]
PACKAGE = pathlib.Path(optcurv.__file__).parent
THIRD_PARTY = {"chex", "jax", "optax"}
INSIDE_FUNCTIONS = {"flax"}  # imported only where it is called


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_come_from_lower_floors(path):
    (floor,) = [n for n, names in enumerate(FLOORS) if path.stem in names]
    below = set().union(*FLOORS[:floor])
    for module in imports(path):
        package, _, name = module.partition(".")
        if package == "optcurv":
            assert name in below, f"{path.name} imports {module}, which is not on a lower floor"
        else:
            assert package in THIRD_PARTY | INSIDE_FUNCTIONS | sys.stdlib_module_names


def test_only_public_jax_is_used():
    for path in PACKAGE.glob("*.py"):
        for module in imports(path):
            assert not module.startswith(("jax._src", "jax.experimental", "optax._src")), path.name


def test_import_pulls_in_no_flax_and_no_matplotlib():
    program = "import sys, optcurv; print(sorted({'flax', 'matplotlib', 'scipy.sparse.linalg'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "flax" not in loaded
    assert "matplotlib" not in loaded


def test_every_public_name_is_documented_with_an_example():
    for name in optcurv.__all__:
        assert ">>>" in getattr(optcurv, name).__doc__, name
