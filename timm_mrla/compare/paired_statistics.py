"""Statistics of paired runs: mean difference, t interval, conclusion in words."""

import math
from typing import NamedTuple

from scipy import stats

__all__ = ['Interval', 'conclusion', 'interval']


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, spec: str) -> str:
        """Mean and interval as text, all three numbers in one format."""
        mean, low, high = (f'{value:{spec}}' for value in self)
        return f'{mean} ({low} to {high})'


def interval(values: list[float]) -> Interval:
    """Mean and t interval of two or more values, such as paired differences; ValueError if one is not finite."""
    if not all(map(math.isfinite, values)):
        raise ValueError(f'{values} are not finite, so that they have no interval')
    found = stats.ttest_1samp(values, 0)
    return Interval(sum(values) / len(values), *map(float, found.confidence_interval(0.95)))


def conclusion(model: str, plain: str, metric: str, found: Interval, pairs: int, lower_is_better: bool) -> str:
    """Say in one sentence what the mean difference between a model and its plain backbone means."""
    numbers = f'{metric} {found.text("+.3g")} over {pairs} seeds'
    if found.low <= 0 <= found.high:
        return f'No difference was found between {model} and {plain}: {numbers}; all within the interval is possible.'
    word = 'worse' if (found.mean < 0) != lower_is_better else 'better'
    caution = '; so few seeds give a lead, not a result' if pairs < 5 else ''
    return f'{model} was {word} than {plain}: {numbers}{caution}.'
