"""Summarizes finished runs: numbers by arm and seed, differences and conclusions, and a report in Markdown."""

import shlex
from statistics import median
from typing import Any

from timm_mrla.compare.arms import Arm
from timm_mrla.compare.paired_statistics import Interval, conclusion, interval
from timm_mrla.compare.runs import Run


def summarize(runs: list[Run], pairs: dict[str, tuple[Arm, Arm]], metric: str) -> dict[str, Any]:
    """Collect the numbers of all finished runs by arm and seed, and compare each model to its plain backbone.

    Runs that failed or diverged are named and left out. Nothing is concluded of a model if runs of it or of its plain
    backbone diverged, because the seeds that are left would speak of the runs that went well only.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {run.arm.name: {} for run in runs}
    failed = [run.name for run in runs if run.progress() < 1]
    diverged = [run.name for run in runs if run.diverged()]
    for run in runs:
        if run.name not in (*failed, *diverged):
            found[run.arm.name][run.seed] = run.result()
    if not any(found.values()):
        raise ValueError(f'no run came to its end and did not diverge; {_left_out(failed, diverged)}')
    last = {
        arm: {seed: [*run['curves'][f'eval_{metric}'].values()][-1] for seed, run in by_seed.items()}
        for arm, by_seed in found.items()
    }

    comparisons = []
    for model, (plain, _) in pairs.items():
        ours, theirs = last[model], last[plain.name]
        seeds = sorted({*ours} & {*theirs})
        row = {'model': model, 'plain': plain.name, 'seeds': seeds}
        unstable = [run.name for run in runs if run.name in diverged and run.arm.name in (model, plain.name)]
        if unstable:
            row['conclusion'] = f'Nothing can be said of {model}: {_left_out([], unstable)}.'
        elif len(seeds) < 2:
            row['conclusion'] = f'Nothing can be said of {model}: fewer than two seeds came to their end with both.'
        else:
            gaps, lower = [ours[seed] - theirs[seed] for seed in seeds], metric == 'loss'
            gap = interval(gaps)
            row['differences'] = gaps
            row['difference'] = gap._asdict()
            row['ahead'] = sum((x < 0) if lower else (x > 0) for x in gaps)
            row['conclusion'] = conclusion(model, plain.name, metric, gap, len(seeds), lower)
        comparisons.append(row)

    arms = {}
    for arm, by_seed in found.items():
        row = arms[arm] = {'runs': by_seed}
        if len(by_seed) > 1:
            row[metric] = interval([*last[arm].values()])._asdict()
        for key in ('parameters', 'images_per_second', 'peak_memory_mib'):
            row[key] = median(values) if (values := [run[key] for run in by_seed.values() if run[key]]) else None
    return {'arms': arms, 'comparisons': comparisons, 'failed': failed, 'diverged': diverged}


def _left_out(failed: list[str], diverged: list[str]) -> str:
    """Name the runs whose numbers are left out."""
    parts = {'failed': failed, 'diverged (a loss or metric is not finite)': diverged}
    return '; '.join(f'{word}: {", ".join(names)}' for word, names in parts.items() if names)


def _number(value: float | None, spec: str) -> str:
    return '-' if value is None else f'{value:{spec}}'


def report(results: dict[str, Any]) -> str:
    """Write the content of results.json as Markdown."""
    metric = results['metric']
    head = ['model', 'seeds', metric, 'difference to plain', 'ahead in', 'params (M)', 'images/s', 'memory (MiB)']
    lines = [head, ['---'] * len(head)]
    by_model = {row['model']: row for row in results['comparisons']}
    for name, arm in results['arms'].items():
        row = by_model.get(name, {})
        lines.append(
            [
                f'`{name}`',
                str(len(arm['runs'])),
                Interval(**arm[metric]).text('.4g') if metric in arm else '-',
                Interval(**row['difference']).text('+.3g') if 'difference' in row else '',
                f'{row["ahead"]} of {len(row["seeds"])}' if 'difference' in row else '',
                _number(arm['parameters'] and arm['parameters'] / 1e6, '.2f'),
                _number(arm['images_per_second'], '.0f'),
                _number(arm['peak_memory_mib'], '.0f'),
            ]
        )
    left_out = _left_out(results['failed'], results.get('diverged', []))  # older files do not have the second
    machine = {key: results[key] for key in ('date', 'device', 'python', 'torch', 'timm', 'timm-mrla')}
    parts = [
        '\n'.join(f'| {" | ".join(line)} |' for line in lines),
        *(row['conclusion'] for row in results['comparisons']),
        f'{metric} after the last epoch: mean and 95 % interval over seeds, and of the differences between runs of one '
        'seed. The intervals speak of other seeds, not of other data, and each of one model alone.',
        *([f'Left out: {left_out}.'] if left_out else []),
        f'`train.py {shlex.join(results["arguments"])}`; {"; ".join(f"{k} {v}" for k, v in machine.items())}',
    ]
    return '\n\n'.join(parts) + '\n'
