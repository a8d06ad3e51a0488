"""Two processes on the CPU: penalty and gradients are those of one process with the whole batch (R19)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of PyTorch has no gloo",
)


def scenario_names() -> list[str]:
    """The names, without importing what only the processes need."""
    source = (TESTS / "distributed_scenarios.py").read_text()
    return re.findall(r"@scenario\ndef (\w+)", source)


def in_two_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        timeout=300,
    )


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("distributed") / "results.json"
    finished = in_two_processes(str(TESTS / "distributed_scenarios.py"), str(path))
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", scenario_names())
def test_r19_two_processes_are_as_one(name, results):
    assert results[name] == ""


def test_every_scenario_is_run(results):
    assert set(results) == set(scenario_names())
    assert len(results) > 10


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_example_runs_under_torchrun(way, tmp_path):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("the package scikit-learn is not installed")
    finished = in_two_processes("examples/distributed.py", way, "--epochs", "2", "--folder", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"epoch 2: loss \d", finished.stdout), finished.stdout
    assert (tmp_path / "jacobians.csv").read_text().startswith("step,layer,mean")
