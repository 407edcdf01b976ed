"""The benchmarks are a star: a study imports the core and itself, and the core no study."""

import ast
import pathlib

import pytest

import benchmarks

ROOT = pathlib.Path(benchmarks.__file__).parent
STUDIES = sorted(path.parent.name for path in ROOT.glob("*/main.py"))
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob("*/*.py"))}


def imports(path):
    """Modules that a file imports, `from package import module` included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_the_core_and_its_own_study(name):
    own = name.split("/")[0]
    for module in imports(FILES[name]):
        package, *rest = module.split(".")
        if package == "benchmarks":
            assert not rest or rest[0] in {"core", own}, (
                f"{name} imports {module}: studies do not know each other. Move what both need to benchmarks/core."
            )


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_says_what_it_is(study):
    readme = (ROOT / study / "README.md").read_text()
    for part in ("**Question.**", "python -m benchmarks", "**Time.**"):
        assert part in readme, f"benchmarks/{study}/README.md lacks {part}."
    for path in (ROOT / study).glob("*.py"):
        assert path.name in readme or path.name == "__init__.py", f"README.md does not say what {path.name} does."
