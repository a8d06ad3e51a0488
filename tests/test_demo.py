"""The demo and the example, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels.cli import _demo_training as training

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[dict, Path]:
    """What a short run prints as JSON, and the folder with its picture."""
    output = tmp_path_factory.mktemp("demo")
    finished = run("-m", "chainzrule_kernels", "demo", "--epochs", "8", "--json", "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout), output


def test_demo_trains_the_same_net_three_ways(demo):
    summary, _ = demo
    results = {row["name"]: row for row in summary["results"]}
    assert list(results) == ["plain PyTorch", "torch.compile", "fused"]
    plain, fused = results["plain PyTorch"], results["fused"]
    assert plain["test_accuracy"] > 0.9
    assert abs(fused["test_accuracy"] - plain["test_accuracy"]) < 0.01
    assert fused["final_loss"] == pytest.approx(plain["final_loss"], rel=1e-3)
    assert 0.0 < fused["largest_parameter_difference"] < 1e-3
    assert fused["tail_ratio"] == pytest.approx(plain["tail_ratio"], rel=1e-2)
    if summary["backend"] != "reference":  # the definition in plain PyTorch saves what plain PyTorch saves
        assert fused["saved_activation_bytes"] < 0.5 * plain["saved_activation_bytes"]


def test_demo_compiles_or_says_why_not(demo):
    summary, _ = demo
    row = next(row for row in summary["results"] if row["name"] == "torch.compile")
    if row["failure"] is None:
        assert 0.0 <= row["largest_parameter_difference"] < 1e-3
    else:
        assert row["ms_per_step"] is None


def test_demo_draws_a_picture(demo):
    summary, output = demo
    assert Path(summary["picture"]) == output / "digits.png"
    assert (output / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_survives_a_compiler_that_fails(tmp_path):
    finished = run(
        "-m", "chainzrule_kernels", "demo", "--epochs", "1", "--output", str(tmp_path), CXX="/bin/false",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "torch.compile did not run: " in finished.stdout
    rows = {line.split("  ")[1].strip(): line.split() for line in finished.stdout.splitlines() if line.startswith("  ")}
    assert rows["torch.compile"][1:] == ["-"] * 6
    assert "-" not in rows["fused"]
    assert "Traceback" not in finished.stderr


def test_demo_names_a_missing_package(tmp_path):
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'sklearn' else find(name, *rest)\n"
        "from chainzrule_kernels.cli import main\n"
        f"sys.exit(main(['demo', '--output', {str(tmp_path)!r}]))\n"
    )
    finished = run("-c", script)
    assert finished.returncode == 1
    assert finished.stderr == (
        "demo: needs scikit-learn, which the package does not install by itself: "
        "pip install 'chainzrule_kernels[demo]'\n"
    )


def test_demo_refuses_no_epochs():
    finished = run("-m", "chainzrule_kernels", "demo", "--epochs", "0")
    assert finished.returncode == 2
    assert "argument --epochs: expected at least 1, got 0" in finished.stderr


def test_plain_net_is_the_net_written_out():
    torch.manual_seed(0)
    net = ck.nn.ChainzRuleNet((4, 5, 6, 3), noise=0.3, dtype=torch.float64)
    plain = training.PlainNet(net).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    reg = ck.DREG(net)
    y, norms = plain(x)
    torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(norms, [calls[0] for calls in reg.jac_sq().values()])


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(16, 8)

    def loss():
        y = x @ weight  # saves x, and the weight
        return (y * y).sum() + (x @ weight).sum()  # saves y, and x again

    assert training.saved_bytes(loss, [weight]) == 2 * 16 * 8 * 4


def test_example_runs():
    finished = run("examples/train_digits.py")
    assert finished.returncode == 0, finished.stderr
    last = next(line for line in finished.stdout.splitlines() if line.startswith("epoch 20"))
    assert float(last.split("test accuracy ")[1].split("%")[0]) > 95.0


def test_two_lines_in_a_gelu_script_give_the_penalty_the_report_and_the_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws its curves with it")
    folder = tmp_path / "curves"
    finished = run("examples/dreg_gelu.py", "--epochs", "2", "--folder", str(folder))
    assert finished.returncode == 0, finished.stderr
    assert "1     GELU" in finished.stdout
    assert "tail ratio  nonlinearity" in finished.stdout
    first, *rows = (folder / "jacobians.csv").read_text().splitlines()
    assert first.startswith("step,layer,mean,p99,tail_ratio,nonlinearity")
    assert [row.split(",")[:2] for row in rows] == [["10", "1"], ["10", "3"]]
    assert (folder / "jacobians.png").read_bytes()[:4] == b"\x89PNG"
