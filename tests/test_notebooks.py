"""The notebooks run from top to bottom with the library alone, and are stored as small as they should be."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 200_000  # of a notebook with its outputs; `python notebooks/run.py` stores them so
SHORTER = {  # to see that they run
    "2_which_method_when": {
        "BUDGET, SEEDS = 200, 3": "BUDGET, SEEDS = 12, 3",
        "batch_sizes = (16, 64, num_images)": "batch_sizes = (16, num_images)",
    },
    "4_write_your_own": {"NUM_PRODUCTS, BUDGET = 5, 450": "NUM_PRODUCTS, BUDGET = 5, 50"},
    "5_a_differential_equation_in_ten_lines": {"NUM_STEPS, ADAM_STEPS = 100, 2000": "NUM_STEPS, ADAM_STEPS = 5, 10"},
}

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_five():
    assert len(PATHS) == 5


@pytest.mark.xdist_group("notebooks")  # one after the other: each has a process with a JAX of its own
@every_notebook
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for given, shorter in SHORTER.get(path.stem, {}).items():
        [cell] = [cell for cell in code_cells(notebook) if given in cell.source]
        cell.source = cell.source.replace(given, shorter)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}  # they compile much, compute little
    (tmp_path / "optcurv").symlink_to(ROOT / "optcurv")
    client.execute(env=os.environ | settings | {"PYTHONPATH": str(tmp_path)})


@every_notebook
def test_needs_only_what_the_extra_installs(path):
    """The wheel holds neither benchmarks nor tests."""
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", cell.source, re.MULTILINE), (
            "A notebook must run from an installed optcurv[notebooks]: write what it needs into the notebook."
        )


@every_notebook
def test_begins_with_badge_and_installation(path):
    badge, installation, *_ = nbformat.read(path, as_version=4).cells
    assert badge.cell_type == "markdown"
    assert badge.source.startswith("[![Open in Colab]")
    assert f"/notebooks/{path.name})" in badge.source
    assert "google.colab" in installation.source
    assert "%pip install" in installation.source


@every_notebook
def test_is_stored_with_outputs_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert not any(cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@every_notebook
def test_is_small_and_names_no_machine(path):
    assert path.stat().st_size < MAX_BYTES
    text = path.read_text()
    assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/"))
