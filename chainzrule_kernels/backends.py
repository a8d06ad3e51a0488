"""Which code serves a call: the choice of a backend, how to force one, and how to ask."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")


class _Requested(threading.local):
    """The backend that this thread asked for. (Dynamo can trace a thread-local, and refuses a ContextVar.)"""

    name = "auto"


_requested = _Requested()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block by one backend.

    Args:
        name: ``"reference"`` (the plain-PyTorch definition, differentiated by PyTorch itself), ``"cpu"``, ``"triton"``,
            ``"cuda"``, or ``"auto"`` (the default: the fastest that can serve the call).

    Raises:
        ValueError: when there is no such backend.
        RuntimeError: from a call inside the block that the backend cannot serve, with the reason.

    The choice is local to the thread. ``torch.compile`` and ``torch.export`` make it while they trace: enter the block
    before the first call of the compiled function. The reference lays out its results as PyTorch does; every other
    backend returns contiguous ones, or feature maps with their channels innermost where the op says so.
    """
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or auto, got {name!r}")
    before = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = before


def choose(op: str, z: Tensor, *rest: Any) -> str:
    """The backend that serves a call of ``op`` on ``z``.

    Args:
        op: the public function.
        z: its first argument.
        *rest: its other positional arguments, where the choice depends on them: for the convolution ops.

    Raises:
        RuntimeError: when a backend was asked for that cannot serve the call.
    """
    requested = _requested.name
    if requested == "auto":
        return _automatic(op, z, *rest)
    reason = why_not(requested, op, z, *rest)
    if reason is not None:
        raise RuntimeError(f"{op}: the backend {requested!r} was asked for and cannot serve this call: {reason}")
    return requested


def wants_plain_pytorch() -> bool:
    """Whether the reference was asked for."""
    return _requested.name == "reference"


def _automatic(op: str, z: Tensor, *rest: Any) -> str:
    if z.device.type == "cpu":
        return "cpu" if _native_cpu_missing() is None else "reference"
    able = "reference"
    for name in ("cuda", "triton"):
        if why_not(name, op, z, *rest) is None:
            if slower(name, op, z, *rest) is None:
                return name
            able = name if able == "reference" else able
    return able


def why_not(name: str, op: str, z: Tensor, *rest: Any) -> str | None:
    """Why the backend ``name`` cannot serve a call of ``op`` on ``z`` and the ``rest``; None when it can."""
    if name == "reference":
        return None
    if name == "cpu":
        if z.device.type != "cpu":
            return f"it serves CPU tensors, and this one is on {z.device}"
        return _native_cpu_missing()
    if name == "triton":
        return _triton_missing(op, z)
    return _cuda_missing(op, z, *rest)


def slower(name: str, op: str, z: Tensor, *rest: Any) -> str | None:
    """Why ``auto`` passes over a backend that can serve the call; None when it does not."""
    from chainzrule_kernels import _native_cuda

    return _native_cuda.not_worthwhile(z, *rest) if name == "cuda" and op in _native_cuda.OPS else None


def _native_cpu_missing() -> str | None:
    from chainzrule_kernels import _native

    return _native.missing_because


def _triton_missing(op: str, z: Tensor) -> str | None:
    from chainzrule_kernels import _triton

    if z.device.type not in _triton.device_types:
        return f"it serves CUDA tensors, and this one is on {z.device}"
    if not _triton.serves(op):
        return f"this version has no triton kernel for {op}"
    if not torch.compiler.is_compiling():
        _triton.check()
    return _triton.missing_because


def _cuda_missing(op: str, z: Tensor, *rest: Any) -> str | None:
    from chainzrule_kernels import _native_cuda

    if op not in _native_cuda.OPS:
        return f"this version has no cuda kernel for {op}"
    return _native_cuda.cannot(z, *rest)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes:
        op: the public function.
        backend: the backend that would serve the call.
        reasons: for each other backend, why it would not.
        how: which of several ways the backend takes, and why; None where it has one.
    """

    op: str
    backend: str
    reasons: dict[str, str]
    how: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.backend}"]
        lines += [] if self.how is None else [f"  as {self.how}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve ``op(*args, **kwargs)``, and why not the others. Runs the checks but no kernel.

    Args:
        op: the name of a public function, such as ``"polynomial_dreg"``.
        *args: the positional arguments of the call.
        **kwargs: its keyword arguments.

    Returns:
        An :class:`Explanation`; print it to read it.

    Raises:
        ValueError: when there is no such op. Whatever the call itself would raise for bad arguments.

    Example:
        >>> import torch, chainzrule_kernels as ck
        >>> ck.explain("polynomial", torch.ones(2, 3), torch.ones(4)).backend in ("cpu", "reference")
        True
    """
    from chainzrule_kernels.ops import PUBLIC_OPS

    if not isinstance(op, str) or op not in PUBLIC_OPS:
        raise ValueError(f"op: expected one of {', '.join(PUBLIC_OPS)}, got {op!r}")
    public_op = PUBLIC_OPS[op]
    arguments = inspect.signature(public_op.function).bind(*args, **kwargs)
    arguments.apply_defaults()
    public_op.check(*arguments.args, **arguments.kwargs)
    chosen = choose(op, *arguments.args)
    others = [name for name in BACKENDS if name != chosen]
    reasons = {name: _passed_over(name, chosen, op, *arguments.args) for name in others}
    how = public_op.how(*arguments.args) if chosen == "triton" and public_op.how is not None else None
    return Explanation(op, chosen, reasons, how)


def _passed_over(name: str, chosen: str, op: str, *arguments: Any) -> str:
    """Why a backend does not serve a call that another one was chosen for."""
    reason = why_not(name, op, *arguments)
    if reason is not None:
        return reason
    if _requested.name == chosen:
        return f"it could, but {chosen} was asked for"
    return f"it could, but {slower(name, op, *arguments) or f'{chosen} is faster'}"


@dataclass(frozen=True)
class PublicOp:
    """A public function, its argument check, its plain-PyTorch definition.

    Where Triton serves a call in one of several ways, ``how`` tells which, given the arguments.
    """

    function: Callable[..., Any]
    check: Callable[..., None]
    reference: Callable[..., Any]
    how: Callable[..., str] | None = None


def device_summary() -> list[str]:
    """The devices that PyTorch sees here."""
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    return devices
