"""Layers with learnable polynomials in the place of activations (ChainzRule, arXiv 2605.15463)."""

from chainzrule_kernels.nn.chainzrule_net import ChainzRuleNet
from chainzrule_kernels.nn.polynomial import Polynomial
from chainzrule_kernels.nn.polynomial_linear import PolynomialLinear

__all__ = ["ChainzRuleNet", "Polynomial", "PolynomialLinear"]
