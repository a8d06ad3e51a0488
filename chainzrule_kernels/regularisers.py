r"""Other regularisers, to compare DREG with: penalties on Jacobians that differentiate the forward pass once more.

Each is one expression of PyTorch, right for every model whose samples do not mix (no batch normalisation in training
mode). They are meant for comparison: the first two need a double backward, which costs a training step about as much
again and which ``torch.compile`` refuses; the third needs two more forward passes and no derivative.

The regularisers that PyTorch has are not here:

* weight decay: the argument ``weight_decay`` of :class:`torch.optim.AdamW` or :class:`torch.optim.SGD`,
* dropout: :class:`torch.nn.Dropout`,
* spectral normalisation: :func:`torch.nn.utils.parametrizations.spectral_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["input_gradient_penalty", "jacobian_nuclear_penalty", "projected_jacobian_penalty"]


def input_gradient_penalty(losses: Tensor, inputs: Tensor) -> Tensor:
    r"""``mean_i ‖∂ℓ_i/∂x_i‖²``: the squared gradient of each sample's loss at its input.

    Double backpropagation (Drucker and LeCun, IEEE Transactions on Neural Networks 3, 1992), the input gradient
    regularisation of arXiv 1711.09404.

    Args:
        losses: ``(B,)``, one loss for each sample, such as ``F.cross_entropy(model(x), target, reduction="none")``.
        inputs: ``(B, …)``, the model's input, of which ``losses`` has been computed while it required gradients.

    Returns:
        A 0-d tensor in the dtype of ``inputs``, to be weighted and added to the loss.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or shape, and for inputs that do not require gradients.
    """
    _check_inputs(inputs)
    _check_outputs("losses", losses, inputs, 1)
    (gradient,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()


def projected_jacobian_penalty(
    outputs: Tensor, inputs: Tensor, projections: int | None = 1, generator: torch.Generator | None = None
) -> Tensor:
    r"""``mean_i ‖∂y_i/∂x_i‖_F²``, estimated by random projections (arXiv 1908.02729).

    With ``C`` outputs and unit vectors ``v``, drawn evenly from the sphere for each sample,
    ``‖J‖_F² = C E ‖vᵀ J‖²``. The paper's loss weights it with ``λ / 2``; the weight is the caller's here.

    Args:
        outputs: ``(B, …)``, of which each sample has ``C`` elements.
        inputs: ``(B, …)``, of which ``outputs`` has been computed while it required gradients.
        projections: how many ``v`` to average over, a backward pass each; None for the exact norm, by the ``C`` unit
            vectors.
        generator: of the random numbers; PyTorch's own by default.

    Returns:
        A 0-d tensor in the dtype of ``inputs``, to be weighted and added to the loss.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or shape, and for inputs that do not require gradients.
    """
    _check_inputs(inputs)
    _check_outputs("outputs", outputs, inputs, 2)
    if projections is not None and (not isinstance(projections, int) or isinstance(projections, bool)):
        raise TypeError(f"projections: expected an int or None, got {type(projections).__name__}")
    if projections is not None and projections < 1:
        raise ValueError(f"projections: expected at least 1, got {projections}")
    flat = outputs.flatten(1)
    count = flat.shape[1]
    if projections is None:
        directions = torch.eye(count, dtype=flat.dtype, device=flat.device).unsqueeze(1).expand(-1, flat.shape[0], -1)
        scale = 1.0
    else:
        shape = (projections, *flat.shape)
        directions = torch.randn(shape, dtype=flat.dtype, device=flat.device, generator=generator)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        scale = count / projections
    total = inputs.new_zeros(())
    for direction in directions:
        (gradient,) = torch.autograd.grad(flat, inputs, direction, create_graph=True)
        total = total + gradient.flatten(1).square().sum(1).mean()
    return scale * total


def jacobian_nuclear_penalty(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    inputs: Tensor,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""A surrogate of ``mean_i ‖∂f(x_i)/∂x_i‖_*``, the nuclear norm, for ``f = outer ∘ inner`` (arXiv 2405.14544).

    ``‖J_f‖_* ≤ (‖J_outer‖_F² + ‖J_inner‖_F²) / 2``, and a minimiser of the right side over all such compositions of one
    ``f`` reaches equality. Each squared Frobenius norm is estimated without a derivative, by what Gaussian noise of
    standard deviation ``σ`` does to the output: ``‖J_h(x)‖_F² = E‖h(x + σ ε) - h(x)‖² / σ² + O(σ²)``.

    Args:
        inner: the first part of the model; from ``(B, …)`` to ``(B, …)``.
        outer: the second part.
        inputs: ``(B, …)``.
        noise: ``σ``, in the units of ``inputs`` and of what ``inner`` returns.
        generator: of the random numbers; PyTorch's own by default.

    Returns:
        A 0-d tensor, to be weighted and added to the loss. It costs one more pass through each part, and its backward.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or range.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a torch.Tensor, got {type(inputs).__name__}")
    if not isinstance(noise, int | float) or isinstance(noise, bool):
        raise TypeError(f"noise: expected a number, got {type(noise).__name__}")
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise: expected a positive finite number, got {noise}")
    hidden = inner(inputs)
    inner_norm = _noise_response(inner, inputs, hidden, noise, generator)
    return 0.5 * (inner_norm + _noise_response(outer, hidden, outer(hidden), noise, generator))


def _noise_response(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    outputs: Tensor,
    noise: float,
    generator: torch.Generator | None,
) -> Tensor:
    """``mean_i ‖h(x_i + σ ε_i) - h(x_i)‖² / σ²``."""
    draw = torch.randn(inputs.shape, dtype=inputs.dtype, device=inputs.device, generator=generator)
    change = (function(inputs + noise * draw) - outputs) / noise
    return change.flatten(1).square().sum(1).mean()


def _check_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a torch.Tensor, got {type(inputs).__name__}")
    if not inputs.requires_grad:
        raise ValueError(
            "inputs: expected a tensor that requires gradients; call inputs.requires_grad_() before the forward pass"
        )


def _check_outputs(name: str, value: Tensor, inputs: Tensor, dimensions: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == 1 if dimensions == 1 else value.dim() >= 2
    if not fits or inputs.dim() == 0 or value.shape[0] != inputs.shape[0]:
        expected = "(B,)" if dimensions == 1 else "(B, …)"
        raise ValueError(
            f"{name}: expected shape {expected} with B of inputs, {tuple(inputs.shape)}, got {tuple(value.shape)}"
        )
