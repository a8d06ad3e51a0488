"""The networks that the studies compare: perceptrons with a fixed activation, and ChainzRule nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.utils import parametrizations

import chainzrule_kernels as ck

CHAINZRULE = "ChainzRule"
"""The learnable cubic, one for each layer (arXiv 2605.15463)."""

FIXED: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "GELU": nn.GELU, "tanh": nn.Tanh, "SiLU": nn.SiLU}
ACTIVATIONS = (*FIXED, CHAINZRULE)


def network(
    sizes: Sequence[int], activation: str, *, dropout: float = 0.0, spectral_norm: bool = False
) -> nn.Sequential:
    """Linear layers with an activation behind each but the last.

    Args:
        sizes: the width of the input, of each hidden layer, and of the output.
        activation: one of :data:`ACTIVATIONS`.
        dropout: the probability behind each activation; 0 puts no dropout there.
        spectral_norm: whether each weight is divided by its largest singular value (arXiv 1802.05957).

    Raises:
        ValueError: for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == CHAINZRULE:
        hidden = [[layer] for layer in list(ck.nn.ChainzRuleNet(sizes))[:-1]]
    else:
        hidden = [[nn.Linear(*widths), FIXED[activation]()] for widths in pairwise(sizes[:-1])]
    layers = [layer for part in hidden for layer in (*part, *([nn.Dropout(dropout)] if dropout else []))]
    model = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
    if spectral_norm:
        for module in model:
            if hasattr(module, "weight"):
                parametrizations.spectral_norm(module)
    return model
