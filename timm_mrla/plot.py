"""Draws layer attention and feature maps, in colours that colour-blind readers can tell apart."""

import math
from textwrap import fill

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from timm_mrla.attention import AttentionWeights

__all__ = ['plot_attention', 'plot_feature_maps']

# in inches
_LETTER = 0.085  # width of a letter of 10 points
_EDGE = 0.2
_BAR = 0.7  # width of the scale of colours with its numbers


def _colors(values: list[torch.Tensor]) -> ScalarMappable:
    """One scale of colours for all values: from 0 to the largest, or symmetric about 0 if some are negative."""
    low = min(v.min().item() for v in values)
    high = max(v.max().item() for v in values)
    if low < 0:
        limit = max(-low, high)
        return ScalarMappable(Normalize(-limit, limit), 'PuOr')
    return ScalarMappable(Normalize(0, high), 'cividis')


def _heat_maps(ax: Axes, weights: torch.Tensor, blocks: list[str], columns: int, colors: ScalarMappable) -> None:
    """Draw weights [n, T, T] as a grid of heat maps, numbered if there are several; the lower left one has labels."""
    n, T, _ = weights.shape
    gap = int(n > 1)
    tiles = weights.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), torch.nan)
    tiles = F.pad(tiles, (0, gap, gap, 0, 0, -n % columns), value=torch.nan)
    tiles = tiles.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
    ax.pcolormesh(tiles.numpy(), cmap=colors.cmap, norm=colors.norm, edgecolors='white', linewidth=0.5)
    ax.set_ylim(len(tiles), 0)
    ax.set_xticks([s + 0.5 for s in range(T)], blocks, rotation=90)
    ax.set_yticks([len(tiles) - T + t + 0.5 for t in range(T)], blocks)
    ax.tick_params(length=0, labelsize=7, pad=2)
    ax.spines[:].set_visible(False)
    for head in range(n if gap else 0):
        row, column = divmod(head, columns)
        ax.text(column * (T + 1), row * (T + 1) + 0.9, head, fontsize=5.5, color='gray')


def _numbers(ax: Axes, weights: torch.Tensor, colors: ScalarMappable) -> None:
    """Write weights [T, T] into their cells."""
    for t, row in enumerate(weights.tolist()):
        for s, weight in enumerate(row[: t + 1]):
            red, green, blue, _ = colors.to_rgba(weight)
            color = 'white' if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else 'black'
            text = f'{round(weight, 2) + 0.0:.2f}'  # no -0.00
            ax.text(s + 0.5, t + 0.5, text, ha='center', va='center', fontsize=6.5, color=color)


def plot_attention(attention: AttentionWeights, heading: str, titles: list[str], heads: bool = False) -> Figure:
    """Draw a heat map of the weights for each stage, averaged over heads, or one for each head.

    Args:
        attention: The result of `layer_attention` for B images.
        heading: The figure's heading.
        titles: A title for each of the B images, which are drawn side by side on one scale of colours.
        heads: Draw each head.
    """
    panels = {}
    for stage, weights in attention.items():
        weights = weights.cpu().unflatten(1, (attention.heads[stage], -1)).mean(2)
        panels[stage] = weights if heads else weights.mean(1, keepdim=True)
    colors = _colors([*panels.values()])

    # all lengths in inches; a cell must be as high as the name of a block
    names = [block for blocks in attention.blocks.values() for block in blocks]
    label = 0.7 * _LETTER * max(map(len, names)) + 0.1
    cell = 0.12 if heads else min(0.42, max(0.12, 3 / max(map(len, attention.blocks.values()))))
    columns, sizes = {}, {}
    for stage, weights in panels.items():
        _, n, T, _ = weights.shape
        tile = cell * (T + int(n > 1))
        columns[stage] = min(n, 16, max(1, int(20 / tile)))
        sizes[stage] = tile * columns[stage], tile * math.ceil(n / columns[stage])
    if heads or len(titles) > 1:
        rows = [[(stage, i) for i in range(len(titles))] for stage in panels]
    else:
        rows = [[(stage, 0) for stage in panels]]
    heights = [label + max(sizes[stage][1] for stage, _ in row) + 0.4 for row in rows]
    widths = [label + max(*(sizes[stage][0] for stage, _ in column), 1) + 0.3 for column in zip(*rows, strict=True)]

    average = '' if heads else ', averaged over heads'
    line = f'Each row: what a block retrieves from each block up to itself{average}.'
    room = sum(widths) / len(titles)
    titles = [fill(title, int(room / _LETTER)) for title in titles]
    top = 0.95 + 0.17 * max(title.count('\n') for title in titles)
    W = max(sum(widths), 1.3 * _LETTER * len(heading), 0.7 * _LETTER * len(line)) + 2 * _EDGE + _BAR
    H = top + sum(heights)
    fig = Figure(figsize=(W, H), dpi=120)

    def axes(left: float, top: float, width: float, height: float) -> Axes:
        return fig.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))

    def text(left: float, top: float, text: str, **style) -> None:
        # names of files may contain dollar signs
        fig.text(left / W, 1 - top / H, text, va='top', parse_math=False, **style)

    text(_EDGE, 0.15, heading, fontsize=13)
    text(_EDGE, 0.41, line, fontsize=8, color='gray')
    for i, title in enumerate(titles):
        text(_EDGE + i * room, 0.62, title, fontsize=10)
    for j, row in enumerate(rows):
        for k, (stage, i) in enumerate(row):
            ax = axes(_EDGE + sum(widths[:k]) + label, top + sum(heights[:j]) + 0.3, *sizes[stage])
            _heat_maps(ax, panels[stage][i], attention.blocks[stage], columns[stage], colors)
            ax.set_title(stage, fontsize=9, loc='left', pad=4)
            if cell > 0.3:
                _numbers(ax, panels[stage][i, 0], colors)
    bar = axes(_EDGE + sum(widths), top + 0.3, 0.12, min(2.5, H - top - label - 0.4))
    fig.colorbar(colors, cax=bar)
    bar.tick_params(labelsize=7)
    bar.spines[:].set_visible(False)
    return fig


def plot_feature_maps(before: torch.Tensor, after: torch.Tensor, heading: str, titles: list[str]) -> Figure:
    """Draw the maps of a block before and after layer attention: the mean over channels, and those that change most.

    Args:
        before: Maps [B, C, H, W], the first result of `feature_maps`.
        after: Maps [B, C, H, W], the second result.
        heading: The figure's heading.
        titles: A title for each of the B images, which are drawn side by side.
    """
    B, C, H, W = before.shape
    maps = torch.stack([before, after], dim=2).cpu()  # [B, C, 2, H, W]
    n = min(C, 6)
    width = 1.1 * (n + 1)  # in inches
    fig = Figure(figsize=(B * width + 0.2, 1.0 + 2.1 * H / W), dpi=120, layout='constrained')
    fig.suptitle(heading, fontsize=13, x=0.01 / B, ha='left', parse_math=False)
    for part, title, x in zip(fig.subfigures(1, B, squeeze=False)[0], titles, maps, strict=True):
        part.suptitle(fill(title, int(width / _LETTER)), fontsize=10, x=0.01, ha='left', parse_math=False)
        changed = (x[:, 1] - x[:, 0]).abs().mean((1, 2)).topk(n).indices.tolist()
        shown = {'mean': x.mean(0), **{f'channel {c}': x[c] for c in changed}}
        axes = part.subplots(2, n + 1)
        for column, (name, pair) in zip(axes.T, shown.items(), strict=True):
            column[0].set_title(name, fontsize=8)
            for ax, y in zip(column, pair, strict=True):
                ax.imshow(y.numpy(), 'cividis', vmin=pair.min().item(), vmax=pair.max().item())
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
        axes[0, 0].set_ylabel('before', fontsize=8)
        axes[1, 0].set_ylabel('after', fontsize=8)
    return fig
