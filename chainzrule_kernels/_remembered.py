"""Answers about sizes, kept: what a convolution's arguments mean takes longer to find than a small convolution does."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def remembered(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function of whole numbers, sequences of them, and strings, called once for each of the latest 1024 arguments.

    Anything else, such as pairs, a bool (which equals a number) or the symbols of a trace, goes to the function each
    time, as does everything while ``torch.compile`` traces. The function must not have effects, and its result must not
    be changed. What it raises is not kept.
    """
    kept = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def call(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        if keywords or torch.compiler.is_compiling():
            return function(*arguments, **keywords)
        for argument in arguments:
            if not _numbers(argument):
                return function(*arguments, **keywords)
        return kept(*arguments)

    return call


def _numbers(argument: Any) -> bool:
    kind = type(argument)
    if kind is int or kind is str:
        return True
    if kind is not tuple and kind is not torch.Size:
        return False
    for entry in argument:  # noqa: SIM110 - a generator expression would take twice the time
        if type(entry) is not int:
            return False
    return True
