r"""Layers whose weight is spread over processes (``torch.distributed.tensor``): their Jacobian norms.

* DistributedDataParallel and FSDP2: inside the forward the weights are whole, plain tensors. The mean over each
  process's samples, averaged over the processes with the gradients, is the mean over all of them when each has as many.
* Tensor parallelism. With the weight split by rows (``ColwiseParallel``) a process has some of the units of ``z``: the
  sum over the units goes on over the processes. With the weight split by columns (``RowwiseParallel``) every process
  has the whole ``z``, and ``‖W_j‖²`` is a sum over the processes. Either way every process then has the whole penalty,
  as it has the whole loss, and the gradients of its part of the weight.

Nothing here imports ``torch.distributed`` before a distributed tensor is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from chainzrule_kernels.ops.squared_weights.definition import squared_row_norms

__all__ = [
    "bring_weights_back",
    "is_plain",
    "is_sharded",
    "may_shard",
    "refuse_sharded",
    "squared_row_norms_of",
    "whole",
]


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is no distributed one."""
    return type(value) in (Tensor, nn.Parameter) or not hasattr(value, "device_mesh")


def squared_row_norms_of(linear: nn.Module, z: Tensor) -> Tensor:
    """``‖W_j‖²`` for the units ``j`` that ``z`` has, the output of ``linear`` in this process.

    Raises:
        RuntimeError: when FSDP2 shards the weight on its own, so that it is not whole here.
        ValueError: when the weight is spread over processes in a way that does not fit ``z``.
    """
    weight: Any = linear.weight
    norms: Any = squared_row_norms(weight, z)
    if is_plain(weight):
        plain: Tensor = norms
        return plain
    refuse_sharded(linear)
    from torch.distributed.tensor import Replicate, Shard

    split = _split_dimensions(weight, z.shape[-1])
    placements = [Shard(0) if dimension in split else Replicate() for dimension in range(weight.device_mesh.ndim)]
    local: Tensor = norms.redistribute(placements=placements).to_local()
    return local


def whole(jac_sq: Tensor, units: int, linear: nn.Module | None) -> tuple[Tensor, int]:
    """``jac_sq`` of the ``units`` that this process has of a layer, and of all of them, summed over the processes."""
    # A parametrised weight is no parameter, and reading it would compute it.
    weight: Any = None if linear is None else linear._parameters.get("weight")
    if weight is None or is_plain(weight):
        return jac_sq, units
    split = _split_dimensions(weight, units)
    if not split:
        return jac_sq, units
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dimensions = range(weight.device_mesh.ndim)
    parts = [Partial() if dimension in split else Replicate() for dimension in dimensions]
    summed = DTensor.from_local(jac_sq, weight.device_mesh, parts, run_check=False)
    return summed.redistribute(placements=[Replicate()] * len(dimensions)).to_local(), weight.shape[0]


def _split_dimensions(weight: Any, units: int) -> list[int]:
    """The dimensions of the mesh along which a process has a part of the units, as it has of the weight's rows."""
    if units == weight.shape[0]:
        return []
    if units != weight.to_local().shape[0]:
        raise ValueError(
            f"DREG: a weight of shape {tuple(weight.shape)} spread over processes as {weight.placements}, with an "
            f"output of {units} units in this process: expected all of them or those of the process's rows"
        )
    return [dimension for dimension, placement in enumerate(weight.placements) if placement.is_shard(0)]


def may_shard() -> bool:
    """Whether FSDP2 can have sharded anything: it needs a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards parameters of the module: an FSDPModule, without importing it."""
    return hasattr(module, "set_reshard_after_backward")


@_disable_dynamo
def bring_weights_back(jac_sq: Tensor, sharded: Iterable[nn.Module]) -> None:
    """Have FSDP2 gather the weights of modules that contain a layer when the gradient of its norms arrives.

    By itself it does so when that of the modules' outputs arrives, and takes the gradients of the weights then. To that
    of the penalty alone the last outputs contribute nothing.
    """
    if jac_sq.requires_grad:
        for module in sharded:
            jac_sq.register_hook(module._get_fsdp_state()._pre_backward)  # type: ignore[operator]


def refuse_sharded(linear: nn.Module) -> None:
    """Raise for a linear map, split by tensor parallelism, that FSDP2 shards on its own.

    The norms are formed in a hook behind the forward, when FSDP2 has taken the weight away again.
    """
    if is_sharded(linear):
        raise RuntimeError(
            f"DREG: fully_shard was applied to a {type(linear).__name__.removeprefix('FSDP')} alone, whose weight is "
            "then not there for the activation behind it. Apply it to a module that contains both, or use "
            "variant='activation'"
        )
