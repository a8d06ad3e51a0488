"""``python -m chainzrule_kernels bench``: what it measures, records and refuses. No test looks at a time."""

from __future__ import annotations

import csv
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import chainzrule_kernels as ck
from bench import (
    bench_polynomial_conv2d,
    bench_training_step,
    measure,
    peers,
    providers,
    reading,
    record,
    suites,
    workloads,
)
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


@pytest.mark.parametrize("option", ["--json", "--csv", "--report"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.setattr(suites, "measure", lambda *arguments: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("date,op,colour\n")
    assert main(["bench", "--quick", option, str(tmp_path / "file" / "inside")]) == 2
    assert f"bench: {option}: {tmp_path / 'file'} is a file, expected a folder" in capsys.readouterr().err
    (tmp_path / "index.html").mkdir()
    folder = tmp_path if option == "--report" else tmp_path / "index.html"
    assert main(["bench", "--quick", option, str(folder)]) == 2
    assert "index.html is a folder, expected a file" in capsys.readouterr().err
    assert main(["bench", "--quick", "--csv", str(tmp_path / "file")]) == 2
    assert "has other columns" in capsys.readouterr().err


def test_a_report_without_its_template_language(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    monkeypatch.setattr(suites, "measure", lambda *arguments: pytest.fail("it was measured"))
    assert main(["bench", "--quick", "--report", str(tmp_path)]) == 2
    assert "--report needs jinja2" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_number_of_repetitions_that_is_none(capsys: pytest.CaptureFixture[str], number: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", f"--repeat={number}"])
    assert f"expected a whole number of at least 1, got {number}" in capsys.readouterr().err


def test_a_repetition_that_dies_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="repetition 1 ended with status 1"):
        main(["bench", "--quick", "--repeat", "2", "--json", "-"])


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
    status, found = measured(tmp_path, "--suite", "activation_tangent", "--repeat", "2", "--keep-memory")
    assert status == 0
    assert found["machine"]["freed_memory"] == "kept"
    assert reading.read(found).device.endswith("freed memory kept")
    assert len(found["comparisons"]) == len(providers.STAGES)
    for comparison in found["comparisons"]:
        for timing in comparison["timings"].values():
            assert len(timing["run_medians"]) == 2
            assert min(timing["run_medians"]) <= timing["median"] <= max(timing["run_medians"])


FAULTS = """
import resource
import torch
from bench import allocator

def faults_of_ten_large_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults_of_ten_large_tensors()
allocator.keep_freed_memory()
# What is free must first lie together.
faults_of_ten_large_tensors()
faults_of_ten_large_tensors()
print(given_back, faults_of_ten_large_tensors(), allocator.freed_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_kept_memory_is_not_filled_anew() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=suites.FOLDER.parent, capture_output=True, text=True, check=True
    )
    given_back, kept, word = finished.stdout.split()
    assert int(kept) < int(given_back) / 10
    assert word == "kept"


def test_bytes_of_each_stage_are_those_that_must_move() -> None:
    size = workloads.Size("linear", 8, 32, inputs=16)
    x, z, weight = 4 * 8 * 16, 4 * 8 * 32, 4 * 16 * 32
    linear = workloads.linear_polynomial_dreg(size)
    # Only a forward that a backward follows must keep z.
    assert linear.bytes_at("forward") == x + weight + z
    assert linear.bytes_at("backward") == 2 * (x + weight + z)
    assert linear.bytes_at("both") == linear.bytes_at("forward") + z + linear.bytes_at("backward")
    maps = workloads.polynomial_spatial_dreg((2, 8, 7, 7), "a model")
    z, taps = 4 * 2 * 8 * 49, 4 * 8 * 49
    assert [maps.bytes_at(stage) for stage in providers.STAGES] == [2 * z + taps, 3 * z + 2 * taps, 5 * z + 3 * taps]
    # At the last layers of a ResNet the weight is larger than the images.
    layer = bench_polynomial_conv2d.Layer(8, 16, 7, 3, images=2)
    convolution = bench_polynomial_conv2d.workload("polynomial_conv2d", layer)
    x, z, weight = 4 * 2 * 8 * 49, 4 * 2 * 16 * 49, 4 * 8 * 16 * 9
    assert convolution.bytes_at("forward") == x + weight + z
    assert convolution.bytes_at("both") == 3 * (x + weight + z) + z


def test_the_predicted_growth_of_a_training_step_is_that_of_its_products() -> None:
    size = workloads.Size("step", 6, 32)
    for depth in (1, 3):
        example, _ = bench_training_step.example_and_penalties("ChainzRule", size, depth)
        with FlopCounterMode(display=False) as counted:
            bench_training_step.Step(example, bench_training_step.no_penalty)()
        assert bench_training_step.operations_of_products(example) == counted.get_total_flops()


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


@pytest.mark.parametrize(
    "content", ["no JSON", "[1]", '{"a": 1}', '{"comparisons": [{"op": "x"}]}', '{"comparisons": [3]}']
)
def test_comparing_what_is_no_result_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    # Status 1 would say that something became slower.
    file = next(path for path in (suites.FOLDER / "results").glob("*-threads-*.json"))
    other = tmp_path / "other.json"
    other.write_text(content)
    assert main(["bench", "--compare", str(file), str(other)]) == 2
    assert "bench: --compare: " in (said := capsys.readouterr().err)
    assert "other.json" in said


@pytest.mark.parametrize("quick", [False, True])
def test_tiny_sizes_break_no_promise(quick: bool, capsys: pytest.CaptureFixture[str]) -> None:
    content = record.as_json({}, quick)
    content["bounds"][0] |= {"measured": 0.1, "met": False}
    record.show(content, whole=False)
    assert ("MISSED" in capsys.readouterr().out) is not quick
