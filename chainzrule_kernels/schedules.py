"""Schedules for the strength of a regulariser: functions of the number of steps taken.

A schedule gives a factor: :class:`chainzrule_kernels.DREG` uses ``strength × schedule(step)``. The annealing of
arXiv 2606.07908 leaves shape and range open, so both are arguments. At step 0 the value is ``start``; from step
``steps`` on it stays ``end``. :func:`warm_up` puts a rise from zero in front of any of them.

A schedule has no state of its own: the step is the state, and :meth:`chainzrule_kernels.DREG.state_dict` has it. Build
the same schedule again when a run is resumed, and load that state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Schedule", "WarmUp", "constant", "cosine", "exponential", "linear", "warm_up"]


@dataclass(frozen=True)
class Schedule:
    """A value for each step; call it with the number of steps taken.

    Attributes:
        shape: the curve between the ends.
        start: the value at step 0.
        end: the value from step ``steps`` on.
        steps: the length of the way between them.
    """

    shape: Literal["linear", "cosine", "exponential"]
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("start", "end"):
            _check_number(name, getattr(self, name))
        _check_steps(self.steps)
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"start, end: expected positive numbers for an exponential, got {self.start}, {self.end}")

    def __call__(self, step: int) -> float:
        """The value after ``step`` steps."""
        done = min(max(step, 0), self.steps) / self.steps
        if done == 1.0:
            return self.end
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** done
        weight = done if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + (self.end - self.start) * weight


@dataclass(frozen=True)
class WarmUp:
    """A straight rise in front of another schedule; call it with the number of steps taken.

    Attributes:
        then: what follows, a function of the steps taken since the end of the rise.
        steps: the length of the rise.
        start: the value at step 0.
    """

    then: Callable[[int], float]
    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not callable(self.then):
            raise TypeError(f"schedule: expected a function of the step, got {type(self.then).__name__}")
        _check_steps(self.steps)
        _check_number("start", self.start)

    def __call__(self, step: int) -> float:
        """The value after ``step`` steps."""
        if step >= self.steps:
            return self.then(step - self.steps)
        return self.start + (self.then(0) - self.start) * max(step, 0) / self.steps


def constant(value: float = 1.0) -> Schedule:
    """``value`` at every step."""
    return Schedule("linear", value, value, 1)


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line: ``start + (end - start) t`` with ``t = step / steps``."""
    return Schedule("linear", start, end, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine, flat at both ends: ``start + (end - start) (1 - cos(π t)) / 2`` with ``t = step / steps``."""
    return Schedule("cosine", start, end, steps)


def exponential(start: float, end: float, steps: int) -> Schedule:
    """A constant ratio from step to step: ``start (end / start)^t`` with ``t = step / steps``; both ends positive."""
    return Schedule("exponential", start, end, steps)


def warm_up(schedule: Callable[[int], float], steps: int, start: float = 0.0) -> WarmUp:
    """A straight rise from ``start`` to the first value of ``schedule``, then ``schedule``, which begins at its end.

    ``start + (schedule(0) - start) step / steps`` before step ``steps``, ``schedule(step - steps)`` from there on. The
    schedule may be any function of the step; one of this module makes a warm-up that can be copied and stored.
    """
    return WarmUp(schedule, steps, start)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_steps(steps: object) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
