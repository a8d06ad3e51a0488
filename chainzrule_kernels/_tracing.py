"""What torch.compile is told about functions of this package and of PyTorch, without importing Dynamo.

The import of :mod:`torch._dynamo` takes seconds, which a program that compiles nothing shall not wait for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["constant_while_running", "is_exporting", "show_to_function_modes"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def constant_while_running(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Have torch.compile call the function while it traces, and take the result as a constant.

    :func:`torch.compiler.assume_constant_result` does the same and imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_running
def is_exporting() -> bool:
    """Whether ``torch.export`` traces.

    In the compiled functions of torch 2.10 and 2.11 :func:`torch.compiler.is_exporting` itself is always true.
    """
    return torch.compiler.is_exporting()


def show_to_function_modes(functions: Collection[Callable[..., Any]]) -> bool:
    """Have Dynamo show the calls of functions to torch function modes; whether that is settled.

    Dynamo shows those that :func:`torch.overrides.get_overridable_functions` lists. Its list lacks some that do call
    modes outside of a compiled function. Nothing is to be settled before Dynamo has been imported.

    Warns:
        UserWarning: when Dynamo keeps its list elsewhere than that of PyTorch 2.10 to 2.13 does.
    """
    module = sys.modules.get("torch._dynamo.variables.torch")
    if module is None:
        return False
    try:
        shown: set[Callable[..., Any]] = module.get_overridable_functions()
        shown.update(functions)
    except AttributeError:
        names = ", ".join(sorted(f"{function.__module__}.{function.__name__}" for function in functions))
        warnings.warn(
            f"DREG: torch {torch.__version__} does not say which calls it hides from torch function modes in compiled "
            f"functions. Activations that are called by one of these may be left out there: {names}",
            stacklevel=2,
        )
    return True
