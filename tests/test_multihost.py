"""Two processes with two CPU devices each, over the loopback interface: the same steps, and restarts after a kill."""

import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.cases import CASES
from tests.laws.test_contract import reference
from tests.multihost_worker import NUM_PROCESSES

ROOT = pathlib.Path(__file__).parent.parent
NUM_STEPS = 4  # those of the reference


def launch(folder, *options):
    """Starts both processes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.multihost_worker", "--port", str(port), "--folder", str(folder)]
    command += ["--steps", str(NUM_STEPS), *options]
    return [
        subprocess.Popen(
            [*command, "--process", str(n)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for n in range(NUM_PROCESSES)
    ]


def finish(processes):
    """Waits for both; returns what they printed."""
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, "\n".join(outputs)
    return outputs


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(launch(folder))
    return [dict(np.load(folder / f"process-{n}.npz")) for n in range(NUM_PROCESSES)]


@pytest.mark.xdist_group("multihost")
def test_two_processes_end_where_one_does_with_every_method(uninterrupted):
    for case in (case for case in CASES if not case.variant):
        expected = jax.device_get(reference(case)[0])
        scale = max(np.abs(leaf).max() for leaf in expected.values())
        for name, leaf in expected.items():
            key = f"{case.name}/{name}"
            first, second = (found[key] for found in uninterrupted)
            np.testing.assert_array_equal(first, second, err_msg=key)
            np.testing.assert_allclose(first, leaf, rtol=0, atol=1e-4 * scale, err_msg=key)


@pytest.mark.xdist_group("multihost")
def test_after_a_kill_both_go_on_from_the_last_checkpoint_bit_for_bit(uninterrupted, tmp_path):
    methods = ["--methods", "adaptive-cubic", "tso-alra"]  # those of the most state
    survivor, killed = launch(tmp_path, "--die-before", "2", *methods)
    killed.communicate(timeout=500)
    assert killed.returncode == -9
    survivor.kill()  # it waits for the other
    survivor.communicate()
    outputs = finish(launch(tmp_path, *methods))
    assert all("first step 2" in output for output in outputs)
    for n, expected in enumerate(uninterrupted):
        found = np.load(tmp_path / f"process-{n}.npz")
        assert {name.split("/")[0] for name in found} == set(methods[1:])
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
