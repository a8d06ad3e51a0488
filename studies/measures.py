"""What is measured of a trained network."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of the samples whose largest output is that of their class."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def noisy_accuracy(model: nn.Module, x: Tensor, y: Tensor, noise: float, seed: int) -> float:
    """The accuracy when Gaussian noise of a standard deviation has been added to the inputs."""
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return accuracy(model, x + noise * draw.to(x.device), y)


def probabilities(model: nn.Module, x: Tensor) -> np.ndarray:
    """``(B, classes)``."""
    with torch.no_grad():
        return model(x).double().softmax(1).cpu().numpy()


def area_under_curve(probability: np.ndarray, y: np.ndarray) -> float:
    """Of the receiver operating characteristic; over more than two classes, the mean of each against the rest.

    NaN where the probabilities are not finite.
    """
    from sklearn.metrics import roc_auc_score

    if not np.isfinite(probability).all():
        return math.nan
    if probability.shape[1] == 2:
        return float(roc_auc_score(y, probability[:, 1]))
    return float(roc_auc_score(y, probability, multi_class="ovr"))


def tail_ratios(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """p99 / mean over the samples, of each quantity that the papers' tail ratio may be meant of; NaN if not finite.

    ==========================  ================================================================================
    layer Jacobian              ``(Σ_layers ‖J‖_F²)^½``, :meth:`chainzrule_kernels.DREG.jac_sq`
    layer Jacobian squared      ``Σ_layers ‖J‖_F²``
    slopes                      ``(Σ_layers Σ_j f'(z_j)²)^½``, the same without the weights
    network Jacobian            ``‖∂y/∂x‖_F`` from the input to the outputs
    input gradient              ``‖∂ℓ/∂x‖``
    loss gradient               ``‖∂ℓ/∂θ‖``
    loss                        ``ℓ``
    confidence                  the largest probability
    ==========================  ================================================================================
    """
    model.eval()

    def losses(inputs: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs), y, reduction="none")

    quantities = {
        "layer Jacobian": layer_jacobian_squares(model, x, "layer").sqrt(),
        "layer Jacobian squared": layer_jacobian_squares(model, x, "layer"),
        "slopes": layer_jacobian_squares(model, x, "activation").sqrt(),
        "network Jacobian": network_jacobian_norms(model, x),
        "input gradient": ck.diagnostics.input_gradient_norms(losses, x),
        "loss gradient": ck.diagnostics.loss_gradient_norms(model, F.cross_entropy, x, y),
        "loss": losses(x).detach(),
        "confidence": model(x).detach().softmax(1).amax(1),
    }
    return {name: ck.tail_ratio(values) for name, values in quantities.items()}


def tail_ratio_of_layers(model: nn.Module, x: Tensor) -> float:
    """p99 / mean over the samples of ``(Σ_layers ‖J‖_F²)^½``."""
    return ck.tail_ratio(layer_jacobian_squares(model, x, "layer").sqrt())


def layer_jacobian_squares(model: nn.Module, x: Tensor, variant: str) -> Tensor:
    """``(B,)``: for each sample the sum over the layers of DREG's squared norm."""
    ck.DREG.detach(model)
    regulariser = ck.DREG(model, strength=0.0, variant=variant)
    try:
        with torch.no_grad():
            model(x)
        return torch.stack([jac_sq for calls in regulariser.jac_sq().values() for jac_sq in calls]).sum(0)
    finally:
        regulariser.remove()


def network_jacobian_norms(model: nn.Module, x: Tensor) -> Tensor:
    """``(B,)``: ``‖∂y/∂x‖_F``, a backward pass for each output."""
    x = x.detach().requires_grad_()
    outputs = model(x)
    squares = torch.zeros(len(x), device=x.device)
    for position in range(outputs.shape[1]):
        (gradient,) = torch.autograd.grad(outputs[:, position].sum(), x, retain_graph=True)
        squares = squares + gradient.square().sum(1)
    return squares.sqrt()


def nonlinearity(model: nn.Module, x: Tensor) -> float:
    """The mean over the layers of ``E‖J - E J‖² / E‖J‖²`` on these samples, 0 where a layer acts linearly."""
    ck.DREG.detach(model)
    regulariser = ck.DREG(model, strength=0.0)
    try:
        values = [row.nonlinearity for row in regulariser.report(x)]
        return float(np.mean([math.nan if value is None else value for value in values]))
    finally:
        regulariser.remove()
