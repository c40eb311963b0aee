"""Draws the results of a comparison, in colours that colour-blind readers can tell apart."""

import itertools
import math
import re
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ['plot_comparison']


def plot_comparison(results: dict[str, Any]) -> Figure:
    """Draw learning curves, mean and range over seeds, and the paired differences to the plain backbones.

    Args:
        results: The content of results.json.
    """
    metric, models = results['metric'], [row['model'] for row in results['comparisons']]
    rows = [row for row in results['comparisons'] if 'difference' in row]
    plain = [name for name in results['arms'] if name not in models]
    colors = dict(zip(models, colormaps['cividis'](np.linspace(0, 0.8, len(models))), strict=True))
    # models have colours, plain backbones have line styles
    styles = dict(zip(plain, itertools.cycle(['-', '--', ':', '-.']), strict=False))

    height = 3.2 + 0.7 * max(0, len(rows) - 2) + 0.2 * math.ceil(len(results['arms']) / 2)
    fig = Figure(figsize=(10, height), dpi=120, layout='constrained')
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    for name, arm in results['arms'].items():
        curves = [run['curves'][f'eval_{metric}'] for run in arm['runs'].values()]
        curves = [{int(epoch): value for epoch, value in curve.items()} for curve in curves]
        if not curves:
            continue
        epochs = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        x, color = [epoch + 1 for epoch in epochs], colors.get(name, 'darkorange')
        left.plot(x, values.mean(0), styles.get(name, '-'), label=name, marker='.', color=color)
        left.fill_between(x, values.min(0), values.max(0), alpha=0.15, linewidth=0, color=color)
    left.set(xlabel='epochs', ylabel=metric)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title('mean and range over seeds', fontsize=10, loc='left')

    for y, row in enumerate(rows):
        gaps, gap, color = row['differences'], row['difference'], colors[row['model']]
        right.plot(gaps, [y - 0.1] * len(gaps), 'o', alpha=0.4, markeredgewidth=0, color=color)
        right.errorbar(gap['mean'], y + 0.1, xerr=(gap['high'] - gap['low']) / 2, fmt='D', capsize=4, color=color)
    right.axvline(0, color='darkorange', zorder=0)
    right.set(yticks=range(len(rows)), ylim=(max(len(rows), 1) - 0.5, -0.5), xlabel=f'{metric}, difference to plain')
    right.set_yticklabels([re.sub('[.+]', '\n', row['model']) for row in rows], fontsize=8)
    right.set_title('by seed; mean and 95 % interval', fontsize=10, loc='left')
    fig.legend(*left.get_legend_handles_labels(), loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    for ax in (left, right):
        ax.spines[['top', 'right']].set_visible(False)
    return fig
