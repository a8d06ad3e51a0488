"""DREG and threads: one thread's norms are never taken for another's."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from torch import Tensor, nn

import chainzrule_kernels as ck

IN_A_PASS = r"another thread is in a forward pass of this model.*copy.deepcopy"
SINCE = r"another thread has run the model since this one did.*copy.deepcopy"


class Waiting(nn.Module):
    """Two layers, between which a forward of another thread may be held."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.between: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        self.between()
        return torch.tanh(self.second(x))


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """One thread beside that of the test."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def batch(size: float = 1.0) -> Tensor:
    return size * torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("asked", ["model", "penalty", "jac_sq", "report of a pass of its own"])
def test_what_another_thread_asks_for_inside_a_pass_is_refused_and_changes_nothing(asked, thread):
    model = Waiting()
    reg = ck.DREG(model, 1.0)
    model(batch())
    expected = reg.penalty()
    is_inside, may_go_on = Event(), Event()

    def hold() -> None:
        is_inside.set()
        assert may_go_on.wait(60)

    def step() -> Tensor:
        model(batch())
        return reg.penalty()

    model.between = hold
    held = thread.submit(step)
    try:
        assert is_inside.wait(60)
        model.between = lambda: None
        with pytest.raises(RuntimeError, match=IN_A_PASS):
            {
                "model": lambda: model(batch(2.0)),
                "penalty": reg.penalty,
                "jac_sq": reg.jac_sq,
                "report of a pass of its own": lambda: reg.report(batch(2.0)),
            }[asked]()
        assert model.training
    finally:
        may_go_on.set()
    assert torch.equal(held.result(), expected)
    assert torch.equal(step(), expected)


def test_norms_that_another_thread_has_overwritten_are_refused(thread):
    model = Waiting()
    reg = ck.DREG(model, 1.0)
    model(batch())
    expected = reg.penalty()
    thread.submit(model, batch(2.0)).result()
    for ask in (reg.penalty, reg.jac_sq, reg.report):
        with pytest.raises(RuntimeError, match=SINCE):
            ask()
    theirs = thread.submit(reg.penalty).result()
    assert not torch.equal(theirs, expected)
    reg.report(batch())  # a pass of its own, behind which the other thread's is the latest again
    assert torch.equal(thread.submit(reg.penalty).result(), theirs)
    with pytest.raises(RuntimeError, match=SINCE):
        reg.penalty()
    model(batch())
    assert torch.equal(reg.penalty(), expected)


def test_a_thread_that_has_run_no_pass_may_ask_for_the_norms_of_the_latest(thread):
    model = Waiting()
    reg = ck.DREG(model, 1.0)
    thread.submit(model, batch()).result()
    penalty = reg.penalty()
    model(batch())
    assert torch.equal(reg.penalty(), penalty)


def test_a_pass_that_was_interrupted_in_another_thread_keeps_nobody_out(thread):
    model = Waiting()
    reg = ck.DREG(model, 1.0)

    def interrupt() -> None:
        raise KeyboardInterrupt("on demand")

    model.between = interrupt
    with pytest.raises(KeyboardInterrupt):
        thread.submit(model, batch()).result()
    model.between = lambda: None
    model(batch())
    assert [len(calls) for calls in reg.jac_sq().values()] == [1, 1]


def test_a_thread_may_run_a_compiled_model_behind_another(thread):
    model = Waiting()
    reg = ck.DREG(model, 1.0)
    model(batch())
    expected = reg.penalty()
    thread.submit(model, batch(2.0)).result()
    torch.compile(model, backend="eager")(batch())
    torch.testing.assert_close(reg.penalty(), expected)


def test_threads_that_run_one_model_at_once_get_their_own_norms_or_an_error():
    model = Waiting()
    reg = ck.DREG(model, 1.0)
    sizes = [1.0, 2.0, 3.0, 4.0]
    expected = []
    for size in sizes:
        model(batch(size))
        expected.append(reg.penalty())
    together = Barrier(len(sizes))

    def work(model: nn.Module, reg: ck.DREG, size: float) -> list[Tensor | str]:
        x, results = batch(size), []
        together.wait(60)
        for _ in range(50):
            try:
                model(x)
                results.append(reg.penalty())
            except RuntimeError as error:
                results.append(str(error))
        return results

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(sizes)) as threads:
            shared = list(threads.map(lambda size: work(model, reg, size), sizes))
            copied = list(threads.map(lambda size: work(*copy.deepcopy((model, reg)), size), sizes))
    finally:
        sys.setswitchinterval(interval)
    for own, results, results_of_copies in zip(expected, shared, copied, strict=True):
        for result in results:
            assert "another thread" in result if isinstance(result, str) else torch.equal(result, own)
        assert all(torch.equal(result, own) for result in results_of_copies)
