"""One room for each op: its definition in plain PyTorch, the op with its autograd, its kernels, its mathematics."""

from importlib import import_module

from chainzrule_kernels.backends import PublicOp

_ROOMS = (
    "polynomial",
    "polynomial_dreg",
    "activation_dreg",
    "polynomial_spatial_dreg",
    "activation_spatial_dreg",
    "polynomial_tangent",
    "activation_tangent",
    "polynomial_conv1d",
    "polynomial_conv1d_dreg",
    "polynomial_conv2d",
    "polynomial_conv2d_dreg",
    "linear_polynomial_dreg",
    "linear_activation_dreg",
)


def _public_op(name: str) -> PublicOp:
    """What the room of this name offers: a room, its public function and its definition bear the same name."""
    op = import_module(f"{__name__}.{name}.op")
    definition = import_module(f"{__name__}.{name}.definition")
    return PublicOp(getattr(op, name), op.check, getattr(definition, name), getattr(op, "how", None))


PUBLIC_OPS: dict[str, PublicOp] = {name: _public_op(name) for name in _ROOMS}
"""Every public op by its name: the function, its argument check, its reference."""
