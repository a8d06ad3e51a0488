"""``python -m chainzrule_kernels bench``: what it measures, records and refuses. No test looks at a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import chainzrule_kernels as ck
from bench import measure, peers, providers, suites, workloads
from bench.measure import Comparison, Timing
from chainzrule_kernels.cli import bench as command
from chainzrule_kernels.cli import main


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark measures nothing in what it takes for one of several processes of a test run."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def measured(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the results of a quick run."""
    path = folder / "results.json"
    status = main(["bench", "--quick", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for name, what in suites.available().items():
        assert name in printed
        assert what, f"{name} does not say what it measures"
    assert {"polynomial_dreg", "polynomial_conv2d", "training_step"} <= suites.available().keys()


def test_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "polynomial", "nonsense"]) == 2
    printed = capsys.readouterr().err
    assert "there is no suite nonsense" in printed
    assert "polynomial_dreg" in printed


def test_without_the_repository(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_REPOSITORY", tmp_path)
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench: the suites are in the repository of this package, in bench/, and not in an installed package: "
        "run this in a checkout"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def wrong_hermite() -> Any:
    return lambda z, a: z * a.sum()


def test_quick_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Another library's wrong answer is shown and is no failure of this package.
    monkeypatch.setattr(workloads, "TORCHORTHO_HERMITE", peers.Peer("wrong", "wrong", "math", wrong_hermite))
    rows = tmp_path / "rows.csv"
    status, found = measured(
        tmp_path, "--suite", "polynomial", "--csv", str(rows), "--report", str(tmp_path / "report")
    )
    assert status == 0
    assert found["quick"] is True
    assert found["errors"] == {}
    assert found["versions"]["chainzrule_kernels"] == ck.__version__
    assert len(found["comparisons"]) == 4 * len(providers.STAGES)
    for comparison in found["comparisons"]:
        assert {"bytes", "operations", "sweep", "position", "model", "failures", "skipped"} <= comparison.keys()
        assert {"copy", "eager", "fused"} <= comparison["timings"].keys()
        assert comparison["timings"]["fused"]["run_medians"] == []
        assert comparison["skipped"]["compile"]
        assert comparison["bytes"] > 0
        assert ("fused" in comparison["peak_bytes"]) == (comparison["stage"] == "both")
    hermite = [comparison for comparison in found["comparisons"] if comparison["label"].endswith("Hermite")]
    assert hermite
    for comparison in hermite:
        assert "is off by" in comparison["failures"]["wrong"]
        assert "wrong" not in comparison["timings"]
    squared = [comparison for comparison in found["comparisons"] if comparison["label"].endswith("relu squared")]
    assert all("liger-kernel" in comparison["skipped"]["Liger relu²"] for comparison in squared)
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "polynomial" in printed
    with rows.open(newline="") as file:
        statuses = [row["status"] for row in csv.DictReader(file)]
    assert {"measured", "failed", "skipped"} <= set(statuses)
    assert list((tmp_path / "report").glob("*.html"))


def test_a_wrong_answer_of_ours_has_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = ck.activation_tangent

    def wrong(*arguments: Any) -> tuple[torch.Tensor, ...]:
        y, *rest = right(*arguments)
        return (1.01 * y, *rest)

    monkeypatch.setattr(ck, "activation_tangent", wrong)
    status, found = measured(tmp_path, "--suite", "activation_tangent")
    assert status == 1
    assert len(found["comparisons"]) == len(providers.STAGES)
    for comparison in found["comparisons"]:
        assert "is off by" in comparison["failures"]["fused"]
        assert comparison["timings"] == {}
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "broke off" in captured.err


def test_repeated_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Two threads that wait for each other on a busy machine take minutes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status, found = measured(tmp_path, "--suite", "activation_tangent", "--repeat", "2")
    assert status == 0
    assert len(found["comparisons"]) == len(providers.STAGES)
    for comparison in found["comparisons"]:
        for timing in comparison["timings"].values():
            assert len(timing["run_medians"]) == 2
            assert min(timing["run_medians"]) <= timing["median"] <= max(timing["run_medians"])


def test_repetitions_are_merged() -> None:
    def one(median: float, peak: int, **more: Any) -> Comparison:
        timings = {"fused": Timing(median, median - 0.5, median + 0.5, 10), "eager": Timing(2 * median, 0, 9, 10)}
        return Comparison("an op", "a label", "both", bytes=8, timings=timings, peak_bytes={"fused": peak}, **more)

    together = measure.merged([one(1, 100), one(3, 300), one(2, 200, failures={"eager": "off"})])
    assert together.timings == {"fused": Timing(2, 1.5, 2.5, 30, (1, 3, 2))}
    assert together.failures == {"eager": "off"}
    assert together.peak_bytes == {"fused": 300}
    assert together.bytes == 8


def test_comparing_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = next(path for path in (suites.FOLDER / "results").glob("*-threads-*.json"))
    assert main(["bench", "--compare", str(file), str(file)]) == 0
    assert capsys.readouterr().out
    content = json.loads(file.read_text())
    for comparison in content["comparisons"]:
        for quantity in ("median", "lower_quartile", "upper_quartile"):
            if "fused" in comparison["timings"]:
                comparison["timings"]["fused"][quantity] *= 3
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(content))
    assert main(["bench", "--compare", str(file), str(slower)]) == 1
    assert main(["bench", "--compare", str(file), str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
