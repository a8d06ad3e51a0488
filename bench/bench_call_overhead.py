"""What a call costs when there is next to nothing to compute: one row of 64, against ``F.gelu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import chainzrule_kernels as ck
from bench.bounds import OVERHEAD_CALLS, OVERHEAD_LABEL
from bench.measure import Comparison
from bench.providers import Provider

CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "polynomial": lambda z, coeffs: ck.polynomial(z, coeffs),
    "polynomial_dreg": lambda z, coeffs: ck.polynomial_dreg(z, coeffs),
    "activation_dreg": lambda z, coeffs: ck.activation_dreg(z, "gelu"),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("recording", [False, True], ids=["forward", "recording"])
def test_call_overhead(compare: Callable[..., None], op: str, recording: bool) -> None:
    z = torch.randn(1, 64, requires_grad=recording)
    coeffs = torch.randn(4, requires_grad=recording)

    def calls(function: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[Any], None]:
        def run(_: Any) -> None:
            for _call in range(OVERHEAD_CALLS):
                function(z, coeffs)

        return run

    providers = [Provider("F.gelu", calls(lambda z, coeffs: F.gelu(z))), Provider("fused", calls(CALLS[op]))]
    compare(Comparison(op, OVERHEAD_LABEL, "recording" if recording else "forward"), providers)
