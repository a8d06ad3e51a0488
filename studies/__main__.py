"""``python -m studies``: which studies there are."""

from __future__ import annotations

STUDIES = {
    "pima": "ChainzRule and DREG against other methods on the Pima diabetes data",
    "tail_ratio": "which statistic gives the papers' tail ratio, by width and strength",
    "sweep": "four activations, six regularisers, eight data sets, five seeds",
    "sweep_times": "the time of DREG by the fused ops against plain PyTorch's",
}


def main() -> None:
    """Print the commands."""
    for name, summary in STUDIES.items():
        print(f"python -m studies.{name:<12} {summary}")


if __name__ == "__main__":
    main()
