"""The report's pictures: SVG to be put into an HTML page, in colours that follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench import reading, roofline
from bench.growth import Growth
from bench.measure import Comparison

# As in the demo's picture: eager PyTorch blue, torch.compile orange, this package green (Okabe and Ito). What serves as
# a yardstick is grey or pink, other people's work vermilion. Shapes say the same to eyes and printers without colours.
_STYLES = {
    "fused": ("ours", "o"),
    "auto": ("ours", "o"),
    "one kernel": ("ours", "o"),
    "two kernels": ("ours", "o"),
    "eager": ("eager", "s"),
    "plain": ("eager", "s"),
    "compile": ("compile", "^"),
    "compile cooperative": ("compile", "v"),
    "copy": ("copy", "x"),
    "copy into a new buffer": ("copy", "+"),
    "F.linear": ("library", "D"),
    "F.conv2d": ("library", "D"),
    "F.gelu": ("library", "D"),
    "without DREG": ("library", "D"),
}
_COPY_SIZES = {"up to 1 MiB": 1 << 20, "up to 32 MiB": 1 << 25}
_LARGEST_COPIES = "above 32 MiB"
_ROLES = ("ours", "eager", "compile", "copy", "library", "peer", "ink", "line")


def role(provider: str) -> str:
    """Which colour a provider has: ``"ours"``, ``"eager"``, ``"compile"``, ``"copy"``, ``"library"`` or ``"peer"``."""
    return _STYLES.get(provider, ("peer", "P"))[0]


@dataclass(frozen=True)
class Picture:
    """An SVG element.

    Attributes:
        caption: below the picture.
        alternative: what it shows, for those who do not see it.
        svg: the element.
    """

    caption: str
    alternative: str
    svg: str


def bandwidth(comparisons: Sequence[Comparison]) -> Picture | None:
    """Bytes per second over the bytes that must move: the copy is the roof, which falls where caches end."""
    # Where operations bound the work, bandwidth says nothing.
    points = _points([one for one in comparisons if not one.operations], lambda comparison: comparison.bytes)
    if not points.get("copy"):
        return None
    copies: dict[float, list[float]] = {}
    for moved, value in points["copy"]:
        copies.setdefault(moved, []).append(value)
    sizes = sorted(copies)

    def draw(axes: Any) -> None:
        roof = [statistics.median(copies[moved]) for moved in sizes]
        axes.plot(sizes, roof, color=_stand_in("copy"), linewidth=1, alpha=0.6)
        for provider, places in points.items():
            axes.scatter(*zip(*places, strict=True), label=provider, **_marker(provider))
        axes.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="GB/s of them")
        ticks = [2**power for power in range(1, 60, 3) if sizes[0] / 2 <= 2**power <= 2 * sizes[-1]]
        axes.set_xticks(ticks, [_size(tick) for tick in ticks])
        axes.minorticks_off()

    fastest = max(value for _, value in points["copy"])
    slowest = min(value for _, value in points["copy"])
    return _picture(
        draw,
        "Bandwidth by size. Grey is a plain copy of the same bytes, measured in the same rounds: no op can be much "
        "faster. It falls where the data outgrow a cache.",
        f"Scatter plot on logarithmic axes. The copy reaches {slowest:.3g} to {fastest:.3g} GB/s.",
        "roof",
    )


def over_intensity(comparisons: Sequence[Comparison]) -> Picture | None:
    """The roofline: bytes per second over operations per byte, under measured roofs."""
    points = _points(comparisons, roofline.intensity)
    roofs = _copy_roofs(comparisons)
    if not points or not roofs:
        return None
    peak = max(
        (
            value
            for comparison in comparisons
            for name in comparison.timings
            if (value := reading.operations_rate(comparison, name))
        ),
        default=None,
    )

    def draw(axes: Any) -> None:
        for provider, places in points.items():
            if role(provider) != "copy":
                axes.scatter(*zip(*places, strict=True), label=provider, **_marker(provider))
        lowest, highest = (bound(value for places in points.values() for value, _ in places) for bound in (min, max))
        for name, dashes in zip((*_COPY_SIZES, _LARGEST_COPIES), ((1, 2), (4, 3), (9, 3)), strict=True):
            if name in roofs:
                style = {"color": _stand_in("copy"), "linewidth": 1.2, "linestyle": (0, dashes)}
                axes.axhline(roofs[name], label=f"copy, {name}", **style)
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte", ylabel="GB/s")
        if peak:
            axes.plot(
                [lowest / 2, highest * 2],
                [peak / 1e9 / (lowest / 2), peak / 1e9 / (highest * 2)],
                color=_stand_in("library"),
                linewidth=1,
                label=f"{peak / 1e9:.3g} GFLOP/s, best seen",
            )
        values = [value for places in points.values() for _, value in places]
        axes.set(xlim=(lowest / 2, highest * 2), ylim=(min(values) / 2, 3 * max(*values, *roofs.values())))

    roofs_said = ", ".join(f"{value:.3g} GB/s at {name}" for name, value in roofs.items())
    return _picture(
        draw,
        "Roofline. Dashed: the measured copy, by size. Sloping, where matrix products were measured: the most "
        "operations per second that anything reached. A point near a roof has nothing left to gain there; one far "
        "below both is bound by neither. The counts for polynomials are nominal (docs/benchmarks.md).",
        f"Scatter plot on logarithmic axes of GB/s over operations per byte. Roofs: {roofs_said}.",
        "roofline",
    )


def scaling(growths: Sequence[Growth]) -> Picture:
    """The times of one op over one sweep, with the predicted slope through the first point of ours."""
    first = growths[0]

    def draw(axes: Any) -> None:
        for growth in growths:
            style = _marker(growth.provider)
            axes.plot(growth.positions, [1e3 * value for value in growth.seconds], color=style["color"], linewidth=1)
            axes.scatter(growth.positions, [1e3 * value for value in growth.seconds], label=growth.provider, **style)
        anchor = next((growth for growth in growths if growth.provider in reading.OURS), first)
        if anchor.predicted is not None:
            start = 1e3 * anchor.seconds[0]
            line = [start * (position / anchor.positions[0]) ** anchor.predicted for position in anchor.positions]
            axes.plot(
                anchor.positions, line, color=_stand_in("ink"), linewidth=1, linestyle=":", label="predicted slope"
            )
        axes.set(xscale="log", yscale="log", xlabel=first.sweep, ylabel="ms")
        positions = sorted({position for growth in growths for position in growth.positions})
        axes.set_xticks(positions, [f"{position:g}" for position in positions])
        axes.minorticks_off()

    fitted = "; ".join(f"{growth.provider} {growth.exponent:.2f}" for growth in growths)
    return _picture(
        draw,
        f"{first.op}, {_words(first.stage)}, over {first.sweep}",
        f"Times on logarithmic axes over {first.sweep}. Fitted exponents: {fitted}.",
        f"{first.op}-{first.sweep}-{first.stage}",
    )


def _points(
    comparisons: Sequence[Comparison], place: Callable[[Comparison], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """GB/s over something, for each provider that a roofline is about."""
    points: dict[str, list[tuple[float, float]]] = {}
    for comparison in comparisons:
        x = place(comparison)
        for provider in comparison.timings:
            moved = reading.rate(comparison, provider)
            if x and moved and provider in ("copy", "eager", "compile", *reading.OURS):
                points.setdefault(provider, []).append((x, moved / 1e9))
    return points


def _copy_roofs(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The copy's GB/s by how much was copied: the middle of each class."""
    classes: dict[str, list[float]] = {}
    for comparison in comparisons:
        moved = reading.rate(comparison, "copy")
        if moved and comparison.bytes:
            name = next((name for name, limit in _COPY_SIZES.items() if comparison.bytes <= limit), _LARGEST_COPIES)
            classes.setdefault(name, []).append(moved / 1e9)
    return {name: sorted(values)[len(values) // 2] for name, values in classes.items()}


def _marker(provider: str) -> dict[str, Any]:
    shape = _STYLES.get(provider, ("peer", "P"))[1]
    return {"color": _stand_in(role(provider)), "marker": shape, "s": 22, "linewidths": 1}


def _stand_in(name: str) -> str:
    """A colour that nobody would choose, to be replaced by the page's."""
    return f"#00000{_ROLES.index(name) + 1}"


def _picture(draw: Callable[[Any], None], caption: str, alternative: str, prefix: str) -> Picture:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, line = _stand_in("ink"), _stand_in("line")
    style: Any = {
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": line,
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.minor.visible": False,
        "grid.color": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(4.6, 3.5), layout="constrained")
        axes.grid(alpha=0.5, linewidth=0.5)
        axes.set_axisbelow(True)
        draw(axes)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8, columnspacing=1, handletextpad=0.3)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return Picture(caption, alternative, _inline(written.getvalue(), re.sub(r"\W+", "-", prefix)))


def _inline(document: str, prefix: str) -> str:
    """The SVG element of a document, with the page's fonts and colours, and names that no other picture has."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r"(font:[^;\"]*?px )[^;\"]+", r"\1var(--sans)", svg)
    for name in _ROLES:
        svg = svg.replace(_stand_in(name), f"var(--{name})")
    return svg


def _size(count: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g} B"


def _words(stage: str) -> str:
    return "forward + backward" if stage == "both" else stage
