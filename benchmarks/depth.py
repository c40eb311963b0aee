"""Reports how the differences between models with layer attention and their plain backbone change with depth.

    python benchmarks/depth.py RESULTS_JSON [RESULTS_JSON ...] --picture PNG

The files are results of `timm-mrla compare`, one for each depth, with `--model-kwargs layers=(DEPTH,...)`.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from timm_mrla.compare.paired_statistics import interval

COLUMNS = {'eval_top1': 'top1', 'eval_loss': 'test loss', 'train_loss': 'training loss'}  # of train.py's summary.csv
Results = dict[int, dict[str, Any]]  # blocks in each stage -> results of a comparison


def read(paths: list[Path]) -> Results:
    """Read results by depth, the shallowest first."""
    found = {}
    for path in paths:
        results = json.loads(path.read_text())
        depth = re.search(r'layers=\((\d+)', ' '.join(results['arguments']))
        if not depth:
            raise ValueError(f'{str(path)!r} is no comparison with --model-kwargs layers=(...)')
        found[int(depth[1])] = results
    return dict(sorted(found.items()))


def last(arm: dict[str, Any], column: str) -> dict[str, float]:
    """The values of the last epoch by seed."""
    return {seed: [*run['curves'][column].values()][-1] for seed, run in arm['runs'].items()}


def models(results: dict[str, Any]) -> list[str]:
    """The models with layer attention."""
    return [row['model'] for row in results['comparisons']]


def gaps(results: dict[str, Any], model: str, other: str, column: str) -> list[float]:
    """The differences of one arm to another, by seed."""
    ours, theirs = (last(results['arms'][name], column) for name in (model, other))
    return [ours[seed] - theirs[seed] for seed in sorted({*ours} & {*theirs})]


def to_plain(results: dict[str, Any], model: str, column: str) -> list[float]:
    """The differences of a model to its plain backbone, by seed."""
    (plain,) = (row['plain'] for row in results['comparisons'] if row['model'] == model)
    return gaps(results, model, plain, column)


def bullet(name: str, values: dict[str, list[float]]) -> str:
    """A line of a list: the mean and the interval of values for each column."""
    return f'* {name}: ' + ', '.join(f'{COLUMNS[c]} {interval(v).text("+.2g")}' for c, v in values.items())


def table(by_depth: Results) -> str:
    """A Markdown table: means of all arms, and differences in pairs of one seed with their 95 % intervals."""
    lines = [['blocks', 'model', *(f'{name}, difference' for name in COLUMNS.values()), 'params (M)', 'images/s']]
    lines.append(['---'] * len(lines[0]))
    for depth, results in by_depth.items():
        for name, arm in results['arms'].items():
            texts = [f'{interval([*last(arm, column).values()]).mean:.4g}' for column in COLUMNS]
            if name in models(results):
                found = [interval(to_plain(results, name, column)) for column in COLUMNS]
                texts = [f'{text}, {gap.text("+.2g")}' for text, gap in zip(texts, found, strict=True)]
            parameters, speed = arm['parameters'] / 1e6, arm['images_per_second']
            lines.append([str(depth), f'`{name}`', *texts, f'{parameters:.2f}', f'{speed:.0f}'])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def trends(by_depth: Results) -> str:
    """List how the differences to plain change from the least to the greatest depth, in pairs of one seed."""
    (least, shallow), *_, (greatest, deep) = by_depth.items()
    lines = [f'From {least} to {greatest} blocks in each stage, the difference to plain changes by:\n']
    for model in models(deep):
        pairs = {c: zip(to_plain(shallow, model, c), to_plain(deep, model, c), strict=True) for c in COLUMNS}
        lines.append(bullet(f'`{model}`', {c: [after - before for before, after in pairs[c]] for c in COLUMNS}))
    return '\n'.join(lines)


def between_models(by_depth: Results) -> str:
    """List the differences to the first model with layer attention, in pairs of one seed."""
    first, *others = models(next(iter(by_depth.values())))
    lines = [f'The difference to `{first}` is:\n']
    for model in others:
        for depth, results in by_depth.items():
            found = {column: gaps(results, model, first, column) for column in COLUMNS}
            lines.append(bullet(f'`{model}`, {depth} blocks', found))
    return '\n'.join(lines)


def draw(by_depth: Results) -> Figure:
    """Draw the differences against depth: seeds as points, means with 95 % intervals."""
    fig = Figure(figsize=(10, 3.6), dpi=120, layout='constrained')
    for ax, (column, name) in zip(fig.subplots(1, len(COLUMNS)), COLUMNS.items(), strict=True):
        for i, model in enumerate(models(next(iter(by_depth.values())))):
            color = colormaps['cividis'](0.4 * i)
            for place, results in enumerate(by_depth.values()):
                values, x = to_plain(results, model, column), place + 0.15 * (i - 1)
                gap = interval(values)
                ax.plot([x] * len(values), values, 'o', color=color, alpha=0.3, markeredgewidth=0)
                ax.errorbar(
                    x,
                    gap.mean,
                    yerr=(gap.high - gap.low) / 2,
                    fmt='D',
                    capsize=4,
                    color=color,
                    label=model if not place else None,
                )
        ax.axhline(0, color='darkorange', zorder=0)
        ax.set(xlabel='blocks in each stage', ylabel=f'{name}, difference to plain')
        ax.set_xticks(range(len(by_depth)), map(str, by_depth))
        ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    return fig


def main() -> None:
    """Print the table and the lists, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', nargs='+', type=Path, help='results.json of comparisons')
    parser.add_argument('--picture', type=Path, required=True, help='PNG to write')
    args = parser.parse_args()
    by_depth = read(args.results)
    print(table(by_depth), trends(by_depth), between_models(by_depth), sep='\n\n')
    draw(by_depth).savefig(args.picture)


if __name__ == '__main__':
    main()
