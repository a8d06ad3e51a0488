"""Times and memory: several providers interleaved in one run, after each has shown that its answer is right."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.providers import COPIES, Provider

# Otherwise PyTorch's profiler prints two lines at each measurement of memory, through the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

MINIMUM_ROUNDS = 5
MINIMUM_OF_LONG_ROUNDS = 3
LONG_ROUND = 0.5
"""Seconds from which on a round of all providers, each run twice, is repeated less often."""

MAXIMUM_ROUNDS = 60

SWEEPS = ("batch", "width", "degree", "tangents", "depth", "channels")
"""The quantities whose growth a series of comparisons shows."""


@dataclass(frozen=True)
class Timing:
    """The time of one call, over the rounds of a run, in seconds.

    Attributes:
        median: over the rounds; of a repeated run the median of the repetitions' medians.
        lower_quartile: likewise.
        upper_quartile: likewise.
        rounds: how many calls were timed, in all repetitions.
        run_medians: the median of each repetition, where the run was repeated.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int
    run_medians: tuple[float, ...] = ()


@dataclass
class Comparison:
    """What was measured of one piece of work: a timing for each provider, or why it has none.

    Attributes:
        op: the public function, or what else is measured.
        label: which arguments.
        stage: ``"forward"``, ``"backward"``, ``"both"``, ``"memory"``, ….
        bytes: what any implementation must move at this stage, where memory bounds the work.
        operations: floating-point operations at this stage, where those bound the work.
        sweep: which quantity grows over a series of comparisons: one of :data:`SWEEPS`.
        position: that quantity here.
        model: the real model that the shape comes from.
        timings: by provider.
        failures: by provider, what was wrong with an answer; no figure then.
        skipped: by provider, why it was not measured.
        peak_bytes: by provider, the most memory held at once.
    """

    op: str
    label: str
    stage: str
    bytes: int | None = None
    operations: int | None = None
    sweep: str | None = None
    position: int | None = None
    model: str | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """The ratio of two medians; None when one is missing."""
        if numerator not in self.timings or denominator not in self.timings:
            return None
        return self.timings[numerator].median / self.timings[denominator].median


def compare(comparison: Comparison, providers: Sequence[Provider], benchmark: Any, seconds: float) -> None:
    """Check every provider, then time those that are right, interleaved; behind that their peak memory.

    Each round runs every provider twice in a row and times the second run, which finds its own data where its own first
    run left them; a round of all providers is done before the next begins, so that a machine that slows down slows all
    of them. The last provider, the fused one, is timed by pytest-benchmark and the others by the same clock.

    Args:
        comparison: takes the results.
        providers: the fused one last. One that is missing, raises or is wrong gets no timing.
        benchmark: the fixture of pytest-benchmark.
        seconds: about how long to measure.
    """
    for provider in providers:
        if provider.missing_because is not None:
            comparison.skipped[provider.name] = provider.missing_because
    here = [provider for provider in providers if provider.missing_because is None]
    right = [provider for provider in here if _is_right(provider, comparison)]
    if providers[-1] not in right:
        raise AssertionError(f"{providers[-1].name}: {comparison.failures[providers[-1].name]}")
    *others, last = right
    start = time.perf_counter()
    for provider in right:
        _warm(provider)
    one_round = 2 * (time.perf_counter() - start)
    fewest = MINIMUM_ROUNDS if one_round < LONG_ROUND else MINIMUM_OF_LONG_ROUNDS
    rounds = max(fewest, min(MAXIMUM_ROUNDS, int(seconds / max(one_round, 1e-9))))
    samples: dict[str, list[float]] = {provider.name: [] for provider in others}

    def before_each_round() -> tuple[tuple[Any], dict[str, Any]]:
        for provider in others:
            _warm(provider)
            state = provider.prepare()
            start = time.perf_counter()
            provider.run(state)
            samples[provider.name].append(time.perf_counter() - start)
        _warm(last)
        return (last.prepare(),), {}

    benchmark.group = f"{comparison.op}, {comparison.label}, {comparison.stage}"
    benchmark.pedantic(last.run, setup=before_each_round, rounds=rounds, warmup_rounds=0)
    samples[last.name] = list(benchmark.stats.stats.data)
    comparison.timings = {name: _timing(values) for name, values in samples.items()}
    benchmark.extra_info.update({name: timing.median for name, timing in comparison.timings.items()})
    if comparison.stage == "both" and comparison.sweep is None:
        for provider in right:
            if provider.name not in COPIES:
                comparison.peak_bytes[provider.name] = peak_allocation(partial(provider.run, provider.prepare()))


def peak_allocation(work: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator had handed out at once for ``work``."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _is_right(provider: Provider, comparison: Comparison) -> bool:
    try:
        wrong = provider.check(provider.run(provider.prepare()))
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    if wrong is not None:
        comparison.failures[provider.name] = wrong
    return wrong is None


def _warm(provider: Provider) -> None:
    provider.run(provider.prepare())


def merged(repetitions: Sequence[Comparison]) -> Comparison:
    """Of one comparison in each repetition of a run: medians of the times, the largest memory, every failure."""
    first = repetitions[0]
    together = replace(first, timings={}, failures={}, skipped={}, peak_bytes={})
    for one in repetitions:
        together.failures.update(one.failures)
        together.skipped.update(one.skipped)
        for name, size in one.peak_bytes.items():
            together.peak_bytes[name] = max(size, together.peak_bytes.get(name, 0))
    for name in dict.fromkeys(name for one in repetitions for name in one.timings):
        # A provider that was wrong once gets no figure.
        if name in together.failures:
            continue
        timings = [one.timings[name] for one in repetitions if name in one.timings]
        medians = tuple(timing.median for timing in timings)
        together.timings[name] = Timing(
            statistics.median(medians),
            statistics.median(timing.lower_quartile for timing in timings),
            statistics.median(timing.upper_quartile for timing in timings),
            sum(timing.rounds for timing in timings),
            medians,
        )
    return together


def _timing(samples: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper, len(samples))
