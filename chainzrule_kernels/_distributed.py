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

from typing import Any

from torch import Tensor, nn

from chainzrule_kernels.ops._linear import squared_row_norms

__all__ = ["squared_row_norms_of", "summed_over_parts", "unit_count"]


def squared_row_norms_of(linear: nn.Module, z: Tensor) -> Tensor:
    """``‖W_j‖²`` for the units ``j`` that ``z`` has, the output of ``linear``.

    Raises:
        RuntimeError: when FSDP2 shards the weight on its own, so that it is not whole here.
        ValueError: when the weight is spread over processes in a way that does not fit ``z``.
    """
    weight: Any = linear.weight
    if _is_plain(weight) or not _is_plain(z):
        return squared_row_norms(weight, z)
    _refuse_sharded(linear)
    from torch.distributed.tensor import Replicate, Shard

    norms: Any = squared_row_norms(weight, z)
    split = _split_dimensions(weight, z)
    placements = [Shard(0) if dimension in split else Replicate() for dimension in range(weight.device_mesh.ndim)]
    local: Tensor = norms.redistribute(placements=placements).to_local()
    return local


def summed_over_parts(jac_sq: Tensor, linear: nn.Module, z: Tensor) -> Tensor:
    """``jac_sq`` of the units that ``z`` has, summed over the processes that have the others."""
    weight: Any = linear.weight
    if _is_plain(weight) or not _is_plain(z):
        return jac_sq
    _refuse_sharded(linear)
    split = _split_dimensions(weight, z)
    if not split:
        return jac_sq
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dimensions = range(weight.device_mesh.ndim)
    parts = [Partial() if dimension in split else Replicate() for dimension in dimensions]
    whole = DTensor.from_local(jac_sq, weight.device_mesh, parts, run_check=False)
    return whole.redistribute(placements=[Replicate()] * len(dimensions)).to_local()


def unit_count(linear: nn.Module | None, z: Tensor) -> int:
    """The number of units of the whole layer, of which ``z`` may have a part."""
    weight: Any = None if linear is None else linear.weight
    return z.shape[-1] if weight is None or _is_plain(weight) else weight.shape[0]


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter) or not hasattr(value, "device_mesh")


def _split_dimensions(weight: Any, z: Tensor) -> list[int]:
    """The dimensions of the mesh along which ``z`` has a part of the units, as the weight has a part of its rows."""
    if z.shape[-1] == weight.shape[0]:
        return []
    if z.shape[-1] != weight.to_local().shape[0]:
        raise ValueError(
            f"DREG: a weight of shape {tuple(weight.shape)} spread over processes as {weight.placements}, with an "
            f"output of {z.shape[-1]} units in this process: expected all of them or those of the process's rows"
        )
    return [dimension for dimension, placement in enumerate(weight.placements) if placement.is_shard(0)]


def _refuse_sharded(linear: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(linear, FSDPModule):
        raise RuntimeError(
            "DREG: fully_shard was applied to a linear layer alone, so that its weight is not there while the "
            "activation behind it runs. Apply it to a module that contains both, or use variant='activation'"
        )
