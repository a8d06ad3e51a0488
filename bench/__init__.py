"""Benchmarks: both sides of a ratio in one run, and no figure for a wrong answer. See docs/performance.md."""
