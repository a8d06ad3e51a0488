"""Building and installing: requirements R1 and R2, and what a wheel holds.

R3 (a build in under two minutes) is a matter of a clock, not of a test: docs/performance.md has the figure.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import chainzrule_kernels as ck

REPOSITORY = Path(__file__).resolve().parent.parent

TRAIN = """
import torch
import chainzrule_kernels as ck

assert ck._native.cpu is None, ck._native.cpu
assert "not installed" in ck._native.missing_because, ck._native.missing_because
torch.manual_seed(0)
model = ck.nn.ChainzRuleNet((4, 16, 2))
regulariser = ck.DREG(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(64, 4)
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()) + regulariser.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(ck.__file__)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, without anything that was built before."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("chainzrule_kernels", "csrc"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def build_wheel(source: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """``pip wheel .`` with torch at hand."""
    command = ["wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--wheel-dir", "wheels"]
    ours = ("CHAINZRULE_KERNELS_", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment.update(variables)
    return subprocess.run(
        [sys.executable, "-m", "pip", *command],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def the_lines(finished: subprocess.CompletedProcess[str], *devices: str) -> list[str]:
    """The line for each device that says why there is no native module; there are no others."""
    output = finished.stdout + finished.stderr
    assert "Traceback" not in output, output
    lines = [line.strip() for line in output.splitlines() if "chainzrule_kernels: the native" in line]
    assert re.findall(r"the native (\w+) module", "\n".join(lines)) == list(devices), output
    return lines


def the_line(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why there is no native module. Of a CUDA module nobody hears whose torch has no CUDA."""
    return the_lines(finished, "CPU")[0]


def the_wheel(source: Path) -> Path:
    """The one wheel that was built; it is pure Python."""
    (wheel,) = (source / "wheels").glob("*.whl")
    assert wheel.name == f"chainzrule_kernels-{ck.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".so", ".pyd", ".cpp"))]
    return wheel


def test_r01_without_a_compiler_the_wheel_is_pure_python_and_trains(source: Path, tmp_path: Path) -> None:
    finished = build_wheel(source, {"CC": "/bin/false", "CXX": "/bin/false"})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "cannot compile C++17" in the_line(finished)

    installed = tmp_path / "installed"
    zipfile.ZipFile(the_wheel(source)).extractall(installed)
    # Without site (-S), so that an editable install of this package does not offer its compiled module.
    path = [str(installed), str(Path(torch.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("CHAINZRULE_KERNELS_NO_NATIVE", None)
    command = [sys.executable, "-S", "-c", TRAIN]
    trained = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    assert Path(trained.stdout.strip()).is_relative_to(installed)


def test_r01_a_compiler_that_is_not_there_is_named(source: Path) -> None:
    finished = build_wheel(source, {"CXX": "/no/such/compiler"})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "no C++ compiler (/no/such/compiler: No such file or directory)" in the_line(finished)
    the_wheel(source)


@pytest.mark.skipif(os.name != "posix", reason="the compiler of this test is a shell script")
def test_r01_a_compilation_that_fails_leaves_a_pure_python_wheel(source: Path) -> None:
    compiler = source / "compiler"
    # Passes for a compiler until there is something to compile.
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fsyntax-only*) exit 0 ;; *) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    finished = build_wheel(source, {"CC": str(compiler), "CXX": str(compiler)})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Of the CUDA module a CUDA build of torch says something, too: here it is the compilation or what it lacks before.
    devices = ["CPU"] if torch.version.cuda is None else ["CPU", "CUDA"]
    assert "compiling it failed" in the_lines(finished, *devices)[0]
    the_wheel(source)


def test_r01_a_required_native_module_that_cannot_be_built_is_an_error(source: Path) -> None:
    finished = build_wheel(source, {"CXX": "/bin/false", "CHAINZRULE_KERNELS_REQUIRE_NATIVE": "1"})
    assert finished.returncode != 0
    assert "CHAINZRULE_KERNELS_REQUIRE_NATIVE is set" in the_line(finished)


def test_the_native_module_can_be_declined_and_the_wheel_holds_what_it_should(source: Path) -> None:
    finished = build_wheel(source, {"CHAINZRULE_KERNELS_NO_NATIVE": "1"})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "CHAINZRULE_KERNELS_NO_NATIVE is set" in the_line(finished)

    wheel = zipfile.ZipFile(the_wheel(source))
    names = set(wheel.namelist())
    assert "chainzrule_kernels/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "chainzrule_kernels",
        f"chainzrule_kernels-{ck.__version__}.dist-info",
    }
    for module in (REPOSITORY / "chainzrule_kernels").rglob("*.py"):
        assert module.relative_to(REPOSITORY).as_posix() in names
    metadata = wheel.read(f"chainzrule_kernels-{ck.__version__}.dist-info/METADATA").decode()
    always_required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert always_required == ["Requires-Dist: torch>=2.10"]


CUDA_TORCH = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
torch.cuda.device_count = lambda: 0
"""


@pytest.mark.skipif(os.name != "posix", reason="the compilers of this test are shell scripts")
def test_r01_neither_module_compiles_and_the_wheel_is_pure_python(source: Path, tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    for compiler in (toolkit / "nvcc", tmp_path / "compiler"):
        compiler.write_text('#!/bin/sh\ncase "$*" in *-fsyntax-only*) exit 0 ;; *) exit 1 ;; esac\n')
        compiler.chmod(0o755)
    headers = tmp_path / "cutlass" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (headers / "cutlass.h").touch()
    # Python imports this module first: torch then passes for a CUDA build.
    (tmp_path / "sitecustomize.py").write_text(CUDA_TORCH)
    compilers = {"CC": str(tmp_path / "compiler"), "CXX": str(tmp_path / "compiler"), "CUDA_HOME": str(toolkit.parent)}
    places = {"PYTHONPATH": str(tmp_path), "CHAINZRULE_KERNELS_CUTLASS_DIR": str(headers.parent.parent)}
    finished = build_wheel(source, {**compilers, **places})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert all("compiling it failed" in line for line in the_lines(finished, "CPU", "CUDA"))
    the_wheel(source)
    required = build_wheel(source, {**compilers, **places, "CHAINZRULE_KERNELS_REQUIRE_CUDA": "1"})
    assert required.returncode != 0
    assert "CHAINZRULE_KERNELS_REQUIRE_CUDA is set" in the_lines(required, "CPU", "CUDA")[1]


@pytest.fixture
def building(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """setup.py beside a CUDA torch and a toolkit, with no variable set that concerns it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in [*os.environ]:
        if name.startswith("CHAINZRULE_KERNELS_") or name == "TORCH_CUDA_ARCH_LIST":
            monkeypatch.delenv(name)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    functions = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="setup")
    return SimpleNamespace(torch=SimpleNamespace(CUDA_HOME=str(tmp_path)), **functions)


def test_r01_each_reason_for_no_cuda_module_is_one_line(
    building: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reason() -> str:
        with pytest.raises(building.NativeBuildError) as caught:
            building.cuda_extension(building.torch)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("CHAINZRULE_KERNELS_NO_CUDA", "1")
    assert reason() == "CHAINZRULE_KERNELS_NO_CUDA is set"
    monkeypatch.delenv("CHAINZRULE_KERNELS_NO_CUDA")

    monkeypatch.setenv("CHAINZRULE_KERNELS_CUTLASS_DIR", str(tmp_path))
    assert reason() == f"the CUTLASS headers are not in CHAINZRULE_KERNELS_CUTLASS_DIR={tmp_path}"
    monkeypatch.delenv("CHAINZRULE_KERNELS_CUTLASS_DIR")
    with monkeypatch.context() as without_packages:
        without_packages.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install --no-deps nvidia-cutlass" in reason()

    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "cutlass.h").touch()
    monkeypatch.setenv("CHAINZRULE_KERNELS_CUTLASS_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0;7.5+PTX")
    assert reason() == "TORCH_CUDA_ARCH_LIST=6.0;7.5+PTX names no architecture from 8.0 on"

    building.torch.CUDA_HOME = None
    assert reason() == "there is no nvcc (CUDA_HOME is None)"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert building.cuda_extension(building.torch) == []


def test_r03_only_the_architectures_that_are_asked_for(
    building: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(value: str) -> list[str]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
        return building.cuda_architectures(torch)

    assert asked("8.0") == ["8.0"]
    assert asked("7.5;8.6;9.0a 10.0+PTX") == ["8.6", "9.0a", "10.0+PTX"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5), (9, 0)][index])
    assert building.cuda_architectures(torch) == ["9.0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert building.cuda_architectures(torch) == ["8.0+PTX"]


def test_every_optional_dependency_is_pinned_for_development() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    extras = re.search(r"\[project\.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)
    assert extras is not None
    wanted = set(re.findall(r'"([\w-]+)"', extras[1])) | {"torch"}
    pinned = set(re.findall(r"^([\w-]+)==[\d.]+(?:;.*)?$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert wanted <= pinned, f"not pinned in constraints.txt: {sorted(wanted - pinned)}"


def native_module() -> Path:
    """The compiled module."""
    if ck._native.cpu is None:
        pytest.skip(f"there is no compiled module to look into: {ck._native.missing_because}")
    assert ck._native.cpu.__file__ is not None
    return Path(ck._native.cpu.__file__)


def binary_tool(name: str) -> str:
    """A tool of binutils."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed, and it is what reads the compiled module")
    return path


def test_r02_the_native_module_uses_no_symbol_outside_the_stable_abi() -> None:
    command = [binary_tool("nm"), "--dynamic", "--undefined-only", "--demangle", str(native_module())]
    undefined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in undefined, "it calls torch through the stable ABI, so that such a symbol must be there"
    assert not re.findall(r".*\b(?:c10|at|torch|caffe2)::.*", undefined)


def test_r02_pybind11_is_included_in_the_way_that_every_torch_allows() -> None:
    files = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".inl")]
    including = [path.name for path in files if "#include <pybind11" in path.read_text()]
    assert including == ["python_module.h"]
    text = (REPOSITORY / "csrc" / "python_module.h").read_text()
    assert text.index("#undef TORCH_TARGET_VERSION") < text.index("#include <pybind11")
    assert "#include <torch" not in text


def test_r02_the_native_module_needs_no_library_that_a_cpu_build_of_torch_lacks() -> None:
    command = [binary_tool("readelf"), "--dynamic", "--wide", str(native_module())]
    needed = re.findall(
        r"\(NEEDED\).*\[(.+)\]", subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    of_torch = [name for name in needed if re.search(r"torch|c10|cuda", name)]
    assert of_torch == ["libtorch_cpu.so"]


def test_the_examples_of_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    training, regularising, converting, backends = blocks
    assert len(training.strip().splitlines()) == 10

    names = {"batches": [(torch.randn(8, 64), torch.randint(10, (8,)))]}
    exec(training, names)
    assert names["regulariser"].penalty().item() > 0
    assert all(parameter.grad is not None for parameter in names["model"].parameters())

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 10))
    names = {"torch": torch, "ck": ck, "model": model, "x": torch.randn(8, 64), "target": torch.randint(10, (8,))}
    regularising = regularising.splitlines()
    exec(regularising[0], names)
    with pytest.raises(RuntimeError, match="no forward pass"):
        names["regulariser"].penalty()
    exec("\n".join(regularising[1:]), names)
    assert [layer.name for layer in names["regulariser"].layers] == ["1"]
    assert names["loss"] > torch.nn.functional.cross_entropy(model(names["x"]), names["target"])

    convolutions = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
    names = {"ck": ck, "resnet": torch.nn.Sequential(*convolutions)}
    exec(converting, names)
    assert [type(module).__name__ for module in names["net"]] != [type(module).__name__ for module in convolutions]
    assert [type(module).__name__ for module in names["resnet"]] == [type(module).__name__ for module in convolutions]

    names = {"ck": ck, "z": torch.randn(8, 64), "coeffs": torch.tensor([0.0, 1.0, 0.0, 0.1])}
    exec(backends, names)
    assert names["jac_sq"].shape == (8,)


@pytest.mark.parametrize("page", ["dreg.md", "training.md"])
def test_the_examples_of_the_pages_on_dreg_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("matplotlib", "tensorboard") if page == "training.md" else ():
        pytest.importorskip(needed, reason=f"the page uses {needed}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_the_links_of_the_documentation_lead_somewhere() -> None:
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("chainzrule_kernels/ops/*/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 10
    assert not [(str(page), link) for page, link in links if not (page.parent / link).exists()]
