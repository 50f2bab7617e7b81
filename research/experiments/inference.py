"""Statistical inference on paired runs: intervals, paired tests, and the number of runs that a claim would need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

__all__ = ["holm", "interval", "mcnemar", "paired_p", "runs_needed"]


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the confidence interval of a mean, by Student's t; None for fewer than two values.

    Args:
        values: One per run.
        level: Confidence level.
    """
    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test that the mean difference is zero; None for fewer than two pairs.

    Args:
        differences: One per pair of runs with the same seed.
    """
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean * math.sqrt(len(differences)) / spread
    return float(2 * stats.t.sf(abs(t), len(differences) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for the number of comparisons by Holm's method (Scand. J. Statist. 6, 1979).

    Args:
        p_values: By comparison.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test that two models are right equally often on the same images.

    Args:
        only_first: Images that only the first model gets right.
        only_second: Images that only the second model gets right.
    """
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def runs_needed(spread: float, difference: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Number of pairs of runs with which a paired t-test finds a difference.

    Args:
        spread: Standard deviation of the differences between pairs.
        difference: The difference to find, not zero, in the same unit.
        power: Probability of finding it.
        alpha: Significance level, two-sided.

    Returns:
        2 to 1000; 1000 stands for 1000 or more.

    Raises:
        ValueError: `difference` is zero.
    """
    if difference == 0:
        raise ValueError("difference: received 0; valid: any other number")
    if spread == 0:
        return 2
    low, high = 2, 1000
    while low < high:
        middle = (low + high) // 2
        critical = stats.t.isf(alpha / 2, middle - 1)
        shift = math.sqrt(middle) * abs(difference) / spread
        # The chance of a significant difference of the wrong sign is negligible, and scipy gives NaN for it.
        if stats.nct.sf(critical, middle - 1, shift) >= power:
            high = middle
        else:
            low = middle + 1
    return low
