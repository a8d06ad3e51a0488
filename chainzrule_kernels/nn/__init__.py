"""Layers with polynomials: ChainzRule's (arXiv 2605.15463), and those of PolyKervNets and their relatives."""

from chainzrule_kernels.nn.activations import ActPKN, Hermite, PolyReLU, ReactPKN
from chainzrule_kernels.nn.chainzrule_net import ChainzRuleNet
from chainzrule_kernels.nn.polynomial import Polynomial
from chainzrule_kernels.nn.polynomial_convolution import (
    KervConv2d,
    PKNConv2d,
    PolynomialConv1d,
    PolynomialConv2d,
    RPKNConv2d,
)
from chainzrule_kernels.nn.polynomial_linear import PolynomialLinear

__all__ = [
    "ActPKN",
    "ChainzRuleNet",
    "Hermite",
    "KervConv2d",
    "PKNConv2d",
    "PolyReLU",
    "Polynomial",
    "PolynomialConv1d",
    "PolynomialConv2d",
    "PolynomialLinear",
    "RPKNConv2d",
    "ReactPKN",
]
