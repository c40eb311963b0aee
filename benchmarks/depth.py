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

from timm_mrla.compare.paired_statistics import Interval, interval

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


def gaps(results: dict[str, Any], row: dict[str, Any], column: str) -> list[float]:
    """The differences of a model to its plain backbone, by seed."""
    ours, plain = (last(results['arms'][row[key]], column) for key in ('model', 'plain'))
    return [ours[str(seed)] - plain[str(seed)] for seed in row['seeds']]


def table(by_depth: Results) -> str:
    """A Markdown table: means of all arms, and differences in pairs of one seed with their 95 % intervals."""
    lines = [['blocks', 'model', *(f'{name}, difference' for name in COLUMNS.values()), 'params (M)', 'images/s']]
    lines.append(['---'] * len(lines[0]))
    for depth, results in by_depth.items():
        rows = {row['model']: row for row in results['comparisons']}
        for name, arm in results['arms'].items():
            cells = [interval([*last(arm, column).values()]).mean for column in COLUMNS]
            texts = [f'{mean:.4g}' for mean in cells]
            if name in rows:
                found = [interval(gaps(results, rows[name], column)) for column in COLUMNS]
                texts = [f'{text}, {gap.text("+.2g")}' for text, gap in zip(texts, found, strict=True)]
            parameters, speed = arm['parameters'] / 1e6, arm['images_per_second']
            lines.append([str(depth), f'`{name}`', *texts, f'{parameters:.2f}', f'{speed:.0f}'])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def trend(by_depth: Results, model: str, column: str) -> Interval:
    """The difference at the greatest depth less that at the least, in pairs of one seed."""
    ends = [
        gaps(results, row, column)
        for results in (by_depth[min(by_depth)], by_depth[max(by_depth)])
        for row in results['comparisons']
        if row['model'] == model
    ]
    return interval([deep - shallow for shallow, deep in zip(*ends, strict=True)])


def trends(by_depth: Results) -> str:
    """Say for each model how its difference to plain changes from the least to the greatest depth."""
    shallow, *_, deep = by_depth
    head = f'From {shallow} to {deep} blocks a stage, the difference to plain changes by:\n'
    lines = [
        f'* `{row["model"]}`: '
        + ', '.join(f'{n} {trend(by_depth, row["model"], c).text("+.2g")}' for c, n in COLUMNS.items())
        for row in by_depth[deep]['comparisons']
    ]
    return '\n'.join([head, *lines])


def draw(by_depth: Results) -> Figure:
    """Draw the differences against depth: seeds as points, means with 95 % intervals as lines."""
    models = [row['model'] for row in next(iter(by_depth.values()))['comparisons']]
    fig = Figure(figsize=(10, 3.6), dpi=120, layout='constrained')
    for ax, (column, name) in zip(fig.subplots(1, len(COLUMNS)), COLUMNS.items(), strict=True):
        for i, model in enumerate(models):
            found = [
                gaps(results, row, column)
                for results in by_depth.values()
                for row in results['comparisons']
                if row['model'] == model
            ]
            intervals, color = [interval(values) for values in found], colormaps['cividis'](0.4 * i)
            x = [place + 0.12 * (i - 1) for place in range(len(by_depth))]
            for place, values in zip(x, found, strict=True):
                ax.plot([place] * len(values), values, 'o', color=color, alpha=0.3, markeredgewidth=0)
            means, errors = [gap.mean for gap in intervals], [(gap.high - gap.low) / 2 for gap in intervals]
            ax.errorbar(x, means, yerr=errors, fmt='-D', color=color, capsize=4, label=model)
        ax.axhline(0, color='darkorange', zorder=0)
        ax.set(xlabel='blocks in each stage', ylabel=f'{name}, difference to plain')
        ax.set_xticks(range(len(by_depth)), map(str, by_depth))
        ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside lower center', ncols=len(models), frameon=False)
    return fig


def main() -> None:
    """Print the table and the trends, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('results', nargs='+', type=Path, help='results.json of comparisons')
    parser.add_argument('--picture', type=Path, required=True, help='PNG to write')
    args = parser.parse_args()
    by_depth = read(args.results)
    print(table(by_depth), trends(by_depth), sep='\n\n')
    draw(by_depth).savefig(args.picture)


if __name__ == '__main__':
    main()
