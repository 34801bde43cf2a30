"""The values below which a share of a sample lies."""

from collections.abc import Iterable


def quantile(values: Iterable[float], share: float) -> float:
    """Return the value below which that share of the values lies; 0 when there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def median_and_p99(values: Iterable[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile; 0 when there are none."""
    ordered = sorted(values)
    return quantile(ordered, 0.5), quantile(ordered, 0.99)
