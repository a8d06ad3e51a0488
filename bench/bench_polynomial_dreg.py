"""``polynomial_dreg`` at every size; at the main one also with shared coefficients, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import measure, workloads


def test_polynomial_dreg(compare: Callable[..., None], size: workloads.Size, stage: str) -> None:
    compare(workloads.polynomial_dreg(size), stage)


def test_shared_coefficients(compare: Callable[..., None], main_size: workloads.Size, stage: str) -> None:
    compare(workloads.polynomial_dreg(main_size, shared=True), stage)


def test_memory(remember: Callable[..., None], main_size: workloads.Size) -> None:
    workload = workloads.polynomial_dreg(main_size)
    leaves = [value.requires_grad_() for value in workload.arguments]

    def step(function: Callable[..., Any]) -> Any:
        return torch.autograd.grad(function(*leaves), leaves, workload.gradients)

    peak_bytes = {
        "eager": measure.peak_allocation(lambda: step(workload.reference)),
        "fused": measure.peak_allocation(lambda: step(workload.fused)),
    }
    remember(measure.Comparison(workload.op, workload.label, "memory", peak_bytes=peak_bytes))
