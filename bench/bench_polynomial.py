"""``polynomial``: per channel and shared, relu², Hermite; beside Liger and torchortho."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import workloads

FORMS = {
    "per channel": workloads.polynomial,
    "shared": workloads.shared_polynomial,
    "relu squared": workloads.relu_squared,
    "Hermite": workloads.hermite,
}


@pytest.mark.parametrize("form", FORMS)
def test_polynomial(compare: Callable[..., None], main_size: workloads.Size, form: str, stage: str) -> None:
    compare(FORMS[form](main_size), stage)
