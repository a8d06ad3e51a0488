"""What every test shares.

Tests of ops take the fixtures ``device`` and ``backend``: each device that is here, and on it each backend that is not
the reference. Where there is none (no compiler when the package was installed) they run the registered operators on
their plain-PyTorch kernels, so that everything but the compiled kernels is still tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import chainzrule_kernels as ck
from chainzrule_kernels import backends

FALLBACK = "operators-on-plain-pytorch"

# Triton's interpreter has to be chosen before Triton is imported: tests/test_triton_interpreter.py runs these.
collect_ignore = ["interpreter"]


def pytest_configure(config: pytest.Config) -> None:
    # On a GPU a test calls many kernels, each with few shapes.
    os.environ.setdefault("CHAINZRULE_KERNELS_COMPILE_AHEAD", "0")
    # Two test processes with two threads each on two cores would spend their time waiting for each other.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Several processes: the one that would begin a test of minutes last would leave the others without work.
    items.sort(key=lambda item: item.path.stem != "test_triton_interpreter")


def _targets() -> list[tuple[str, str]]:
    targets = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        z = torch.ones(1, 1, device=device)
        names = [name for name in backends.BACKENDS if backends.why_not(name, "polynomial", z) is None]
        targets += [(device, name) for name in names if name != "reference"] or [(device, FALLBACK)]
    return targets


@pytest.fixture(params=_targets(), ids=lambda target: "-".join(target))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A device and a backend on it, in force for the test."""
    if request.param[1] == FALLBACK:
        monkeypatch.setattr(backends, "choose", lambda op, *arguments: FALLBACK)
        yield request.param
        return
    with ck.backend(request.param[1]):
        yield request.param


@pytest.fixture
def device(target: tuple[str, str]) -> str:
    """The device of the target."""
    return target[0]


@pytest.fixture
def compiled(target: tuple[str, str]) -> bool:
    """Whether compiled kernels run. Only they fix the order of their sums for every layout and number of threads."""
    return target[1] != FALLBACK


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
