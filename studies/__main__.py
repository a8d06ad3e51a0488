"""``python -m studies``: which studies there are."""

from __future__ import annotations

STUDIES = {
    "pima": "ChainzRule and DREG against other methods on the Pima diabetes data",
    "tail_ratio": "which statistic gives the papers' tail ratio, by width and strength",
    "sweep": "four activations, six regularisers, eight data sets, five seeds",
    "sweep_times": "the time of DREG by the fused ops against plain PyTorch's",
    "schedules": "DREG's strength over the training, under noise in the representations",
    "volatility": "peaks of the gradient, and how many parameters it takes",
    "polykervnet_depth": "which PolyKervNets of 10 to 50 layers train",
}


def main() -> None:
    """Print the commands."""
    width = max(map(len, STUDIES))
    for name, summary in STUDIES.items():
        print(f"python -m studies.{name:<{width}} {summary}")


if __name__ == "__main__":
    main()
