"""Does a comparison in a folder: trains models and their plain backbones alike with timm's train.py, and reports.

comparison.json says what is compared, runs/ARM/SEED is the output folder of train.py, with its log. results.json,
results.md and results.png are made from these only, so the same command continues a comparison that was stopped.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from timm_mrla.compare.arms import plain_and_ours
from timm_mrla.compare.machine import describe_machine
from timm_mrla.compare.plot import plot_comparison
from timm_mrla.compare.report import report, summarize
from timm_mrla.compare.runs import Run, check_metric, train_all
from timm_mrla.compare.train_args import parse_train_args

__all__ = ['compare']


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Give a path to write a file at; move it to its place afterwards, or leave nothing if it cannot be written."""
    part = path.with_name(f'{path.stem}.part{path.suffix}')
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OSError(f'{str(path)!r} cannot be written: {e}') from e


def _write(path: Path, text: str) -> None:
    with _replaced(path) as part:
        part.write_text(text)


def _open_folder(out: Path, comparison: dict[str, Any]) -> None:
    """Start a comparison in a new folder, or check that the folder belongs to this one."""
    path = out / 'comparison.json'
    if path.exists():
        try:
            found = json.loads(path.read_text())
            theirs = ' '.join([*found['models'], '--', *found['arguments'], found.get('config', '')])
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f'{str(path)!r} is not what compare writes; name another --out') from e
        if found != comparison:
            raise ValueError(f'{str(out)!r} belongs to another comparison, {theirs}; name another --out')
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{str(out)!r} is not empty and no folder of a comparison; name another --out')
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(comparison, indent=2) + '\n')


def compare(
    script: str,
    models: list[str],
    out: str,
    train_args: list[str],
    seeds: int = 5,
    metric: str = 'top1',
    devices: Sequence[str | None] = (None,),
) -> dict[str, Any]:
    """Train models and their plain backbones once for each seed, and report the differences.

    Args:
        script: Path of timm's train.py.
        models: Names of models with layer attention, with or without the tag of a warm start; `NAME+KEY=VALUE` gives
            one of them arguments of its own.
        out: Folder of the comparison. A comparison that was stopped continues.
        train_args: Further arguments of train.py, the same for all models, also in a YAML file (-c). Those among
            --model-kwargs that begin with `mrla_` are left out for the plain backbones.
        seeds: Number of seeds. The seeds are 0, 1, 2, ...
        metric: The metric to report: 'top1', 'top5' or 'loss'.
        devices: For each of the runs at once, its CUDA_VISIBLE_DEVICES, or None to leave it unchanged.

    Returns:
        The content of results.json.

    Raises:
        ValueError: An argument is wrong, train.py does not write the metric, or no run came to its end.
        OSError: A file cannot be written, such as on a full disk.
    """
    if not os.path.isfile(script):
        raise ValueError(
            f"there is no script {script!r}; timm's train.py is at the top of its repository, "
            'https://github.com/huggingface/pytorch-image-models'
        )
    code = Path(script).read_text(errors='replace')
    if not (metric and re.search(rf"""['"]{re.escape(metric)}['"]""", code)):
        raise ValueError(f"{script} writes no metric {metric!r}; timm's writes top1, top5 and loss")
    if seeds < 2:
        raise ValueError(f'--seeds {seeds} is less than 2, and an interval needs two')
    if not devices:
        raise ValueError('there are no devices to run on')
    args = parse_train_args(train_args)
    pairs = {model: plain_and_ours(model, args.model_kwargs) for model in models}
    arms = dict.fromkeys(arm for pair in pairs.values() for arm in pair)
    for arm in arms:
        arm.check(args.model_kwargs)
    path = Path(out)
    config = {'config': Path(args.config).read_text()} if args.config else {}
    _open_folder(path, {'models': models, 'arguments': train_args, **config})
    runs = [Run(arm, seed, path / 'runs' / arm.name / str(seed)) for seed in range(seeds) for arm in arms]
    check_metric(runs, f'eval_{metric}')
    try:
        with FileLock(path / '.lock', timeout=0):
            train_all(runs, script, args, devices, f'eval_{metric}')
    except Timeout:
        raise ValueError(f'{out!r} is being worked on by another process') from None

    results = {
        **describe_machine(args.device.partition(':')[0]),
        'train_py': script,
        'arguments': train_args,
        'metric': metric,
        'runs_at_once': len(devices),
        **summarize(runs, pairs, metric),
    }
    _write(path / 'results.json', json.dumps(results, indent=2) + '\n')
    _write(path / 'results.md', report(results))
    with _replaced(path / 'results.png') as part:
        plot_comparison(results).savefig(part)
    return results
