"""Which of the layers that were found are regularised, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from chainzrule_kernels.dreg.discovery import Discovery, Layer

Choice: TypeAlias = str | Iterable[str] | Callable[[Layer], bool] | None
Weights: TypeAlias = Mapping[str, float] | Callable[[Layer], float] | None


def names_of(layer: Layer) -> set[str]:
    """The names by which a layer can be chosen: its own, and those of its linear map and its activation's module."""
    names = {layer.name}
    if layer.linear_name is not None:
        names.add(layer.linear_name)
    if layer.activation is not None:
        names.add(layer.owner_name)
    return names


def matches(layer: Layer, pattern: str) -> bool:
    """Whether one of the layer's names is ``pattern``, in which ``*`` and ``?`` are wildcards."""
    return any(fnmatchcase(name, pattern) for name in names_of(layer))


def choose_layers(discovery: Discovery, choice: Choice) -> list[Layer]:
    """The layers of ``discovery`` that ``choice`` names, in the order in which they were found.

    Raises:
        TypeError, ValueError: when ``choice`` is neither names nor a predicate, or when a name matches nothing.
    """
    if choice is None:
        return list(discovery.layers)
    candidates = [*discovery.layers, *discovery.possible]
    if callable(choice):
        chosen = [layer for layer in discovery.layers if choice(layer)]
        if not chosen:
            raise ValueError(f"layers: the predicate chose none of {_names(discovery.layers)}")
        return chosen
    patterns = _patterns(choice)
    _check_patterns("layers", patterns, candidates)
    return [layer for layer in candidates if any(matches(layer, pattern) for pattern in patterns)]


def weights_of(layers: list[Layer], weights: Weights) -> list[float]:
    """A factor for each layer; 1 for one that ``weights`` does not name.

    Raises:
        TypeError, ValueError: when ``weights`` is neither a mapping nor a function, when a name matches nothing or two
            names with different factors match one layer, or when a factor is not a finite number of at least 0.
    """
    if weights is None:
        return [1.0] * len(layers)
    if callable(weights):
        return [_checked_weight(layer.name, weights(layer)) for layer in layers]
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights: expected a mapping from names to numbers or a function, got {type(weights).__name__}"
        )
    _check_patterns("weights", list(weights), layers)
    factors = []
    for layer in layers:
        given = {_checked_weight(name, weights[name]) for name in weights if matches(layer, name)}
        if len(given) > 1:
            raise ValueError(f"weights: several names with different factors match the layer {layer.name!r}")
        factors.append(given.pop() if given else 1.0)
    return factors


def _patterns(choice: Any) -> list[str]:
    if isinstance(choice, str):
        return [choice]
    try:
        patterns = list(choice)
    except TypeError as error:
        raise TypeError(f"layers: expected names or a predicate, got {type(choice).__name__}") from error
    if not patterns:
        raise ValueError("layers: expected at least one name, got none")
    return patterns


def _check_patterns(argument: str, patterns: list[str], candidates: list[Layer]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: expected names, got {type(pattern).__name__}")
        if not any(matches(layer, pattern) for layer in candidates):
            raise ValueError(f"{argument}: no layer is called {pattern!r}; there are {_names(candidates)}")


def _names(layers: Iterable[Layer]) -> str:
    return ", ".join(repr(layer.name) for layer in layers) or "none"


def _checked_weight(name: str, weight: Any) -> float:
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise TypeError(f"weights: expected a number for {name!r}, got {type(weight).__name__}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weights: expected a finite number of at least 0 for {name!r}, got {weight}")
    return float(weight)
