"""``linear_polynomial_dreg`` and ``linear_activation_dreg`` on the Triton kernels: from tensors to launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chainzrule_kernels.functions import compute_dtype
from chainzrule_kernels.ops import _dreg_triton, _launch
from chainzrule_kernels.ops._call_triton import architecture, contiguous, launch, nothing
from chainzrule_kernels.ops._linear_kernels_triton import linear_dreg_kernel
from chainzrule_kernels.ops._linear_operator import why_no_epilogue


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_sq: Tensor,
    coeffs: Tensor | None,
    kind: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, jac_sq, z)``, ``z`` empty unless it is to be kept."""
    shape = (*x.shape[:-1], weight.shape[0])
    empty = x.numel() == 0 or weight.numel() == 0
    if empty or why_no_epilogue(x, weight, coeffs, keep_z) is not None:
        product = F.linear(x, weight, bias)
        y, jac_sq, _ = _dreg_triton.dreg(product, row_sq, coeffs, kind, False)
        return y, jac_sq, product if keep_z else nothing(x)
    y = x.new_empty(shape)
    z = torch.empty_like(y) if keep_z else None
    norm = x.new_empty(shape[:-1], dtype=compute_dtype(x))
    x, weight, bias, row_sq, coeffs = map(contiguous, (x, weight, bias, row_sq, coeffs))
    rows = norm.numel()
    columns, inner = weight.shape
    itemsize = x.element_size()
    where = architecture(x.device)
    plan = _launch.product_plan(rows, columns, itemsize, where)
    parts = norm if plan.splits == 1 else norm.new_empty(rows, plan.splits)
    launch(
        linear_dreg_kernel,
        plan,
        _launch.product_tiles(itemsize, where),
        (x, weight, bias, row_sq, coeffs, y, z, parts),
        (rows, columns, inner),
        {
            "KIND": kind,
            "DEGREE": 0 if coeffs is None else coeffs.shape[0] - 1,
            "PER_CHANNEL": coeffs is not None and coeffs.dim() == 2,
            "PRECISION": "tf32" if x.dtype == torch.float32 else "ieee",
        },
    )
    if parts is not norm:
        torch.sum(parts, -1, out=norm.view(-1))
    return y, norm, nothing(y) if z is None else z


def linear_polynomial_dreg(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_sq: Tensor, coeffs: Tensor, keep_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``linear_polynomial_dreg``."""
    return _forward(x, weight, bias, row_sq, coeffs, "polynomial", keep_z)


def linear_activation_dreg(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_sq: Tensor, kind: str, keep_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``linear_activation_dreg``."""
    return _forward(x, weight, bias, row_sq, None, kind, keep_z)
