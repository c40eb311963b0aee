"""Trains models with layer attention and their plain backbones alike, by timm's own train.py, and reports what differs.

A folder holds a comparison: comparison.json says which, runs/ARM/SEED is what train.py wrote, with its log, and from
these alone come results.json, results.md and results.png. So a comparison that was stopped goes on where it was.
"""

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from filelock import FileLock, Timeout
from timm.models import is_model_pretrained
from tqdm import tqdm

from timm_mrla import launcher
from timm_mrla.checks import check_model_name
from timm_mrla.machine import about
from timm_mrla.models._registry import BACKBONES, MODEL_ARGS
from timm_mrla.models._weights import TAG
from timm_mrla.paired import Interval, conclusion, interval
from timm_mrla.plot import plot_comparison

__all__ = ['compare', 'report']

# lines of train.py's log
_EPOCHS = re.compile(r'Scheduled epochs: (\d+)')
_STEP = re.compile(r'Train: (\d+) \[.*?\( *(\d+)%\).*?\( *[\d.]+s, +([\d.]+)/s\)')  # epoch, percent of it, images/s
_PARAMETERS = re.compile(r'param count: *(\d+)')
_MEMORY = re.compile(r'Peak memory: (\d+) MiB')  # of timm_mrla.train_hooks


@dataclass(frozen=True)
class Arm:
    """A model that is trained once for each seed, and the arguments that it is built with beside the user's."""

    model: str
    model_args: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model and its arguments."""
        return '+'.join((self.model, *self.model_args))


def _arms(model: str) -> tuple[Arm, Arm]:
    """The plain backbone of a model, and the model."""
    check_model_name(model)
    entry, _, tag = model.partition('.')
    if entry not in BACKBONES:
        raise ValueError(f'{model!r} has no plain backbone in timm that it could be compared with')
    if tag and not is_model_pretrained(model):
        raise ValueError(f"{entry} has no warm start {tag!r}; timm.list_pretrained('{entry}.*') lists those it has")
    plain = '.'.join(filter(None, (BACKBONES[entry], tag.removeprefix(TAG))))
    return Arm(plain, tuple(f'{key}={value}' for key, value in MODEL_ARGS.get(entry, {}).items())), Arm(model)


def _read_config(path: str) -> dict[str, Any]:
    """What a YAML file for train.py says; ValueError if it is none."""
    try:
        config = yaml.safe_load(Path(path).read_text()) if path else {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f'{path!r} cannot be read as YAML: {e}') from e
    if not isinstance(config, dict):
        raise ValueError(f'{path!r} holds no arguments of train.py by name, such as lr: 0.1')
    return config


def _parse(train_args: list[str]) -> argparse.Namespace:
    """Arguments of train.py: those that compare gives it beside its own, and in `rest` the others.

    As train.py does, what a YAML file says (-c) is taken where the command line says nothing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own = [parser.add_argument(f'--{name}') for name in ('model', 'seed', 'output', 'experiment', 'resume')]
    own.append(parser.add_argument('--pretrained', action='store_true', default=None))
    parser.add_argument('-c', '--config', default='')
    parser.add_argument('--model-kwargs', nargs='*')
    parser.add_argument('--device')
    parser.add_argument('--device-modules', nargs='+')
    options = parser._option_string_actions  # private, but argparse tells its options nowhere else
    for name in (arg.partition('=')[0] for arg in train_args):
        if len(name) > 2 and name not in options and (long := [o for o in options if o.startswith(name)]):
            raise ValueError(f'{name} may be short for {" or ".join(long)}; write it in full')
    args, rest = parser.parse_known_args(train_args)
    config = _read_config(args.config)
    for action in own:
        if getattr(args, action.dest) is not None:
            raise ValueError(f'compare itself gives train.py its {action.option_strings[0]}; leave it out')
        if config.get(action.dest) not in (None, '') and config[action.dest] is not False:
            raise ValueError(f'compare itself gives train.py its {action.dest}; leave it out of {args.config!r}')
    if args.model_kwargs is None:
        kwargs = config.get('model_kwargs') or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f'model_kwargs in {args.config!r} are not values by name, such as drop_rate: 0.1')
        args.model_kwargs = [f'{name}={value!r}' for name, value in kwargs.items()]
    args.device_modules = args.device_modules or config.get('device_modules') or []
    args.device = args.device or config.get('device') or 'cuda'  # as in train.py
    args.rest = [] if 'checkpoint_hist' in config else ['--checkpoint-hist', '1']
    args.rest += (['-c', args.config] if args.config else []) + rest
    return args


@dataclass
class Run:
    """A run of train.py for an arm and a seed, in a folder of its own."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """The arm and the seed."""
        return f'{self.arm.name}, seed {self.seed}'

    @property
    def log_path(self) -> Path:
        """What train.py printed."""
        return self.folder / 'log.txt'

    def log(self) -> str:
        """What train.py has printed so far."""
        return self.log_path.read_text(errors='replace') if self.log_path.exists() else ''

    def rows(self) -> dict[int, dict[str, str]]:
        """What train.py has written of each epoch so far. Resumed, it writes the head of its table again."""
        path = self.folder / 'summary.csv'
        if not path.exists():
            return {}
        with open(path, newline='') as f:
            return {int(row['epoch']): row for row in csv.DictReader(f) if row['epoch'].isdigit()}

    def progress(self) -> float:
        """How much of it is done, in [0, 1]; 1 once its last epoch is written."""
        log = self.log()
        epochs, steps = _EPOCHS.findall(log), _STEP.findall(log)
        if not (epochs and steps):
            return 0.0
        epochs = int(epochs[-1])
        if epochs - 1 in self.rows():
            return 1.0
        epoch, percent, _ = steps[-1]
        return min((int(epoch) + int(percent) / 100) / epochs, 0.999)

    def start(self, script: str, args: argparse.Namespace, device: str | None) -> subprocess.Popen:
        """Start train.py, from its last checkpoint if there is one."""
        last = self.folder / 'last.pth.tar'
        self.folder.mkdir(parents=True, exist_ok=True)
        # the plain backbone has no arguments of layer attention
        plain = self.arm.model.partition('.')[0] not in BACKBONES
        kwargs = [kwarg for kwarg in args.model_kwargs if not (plain and kwarg.startswith('mrla_'))]
        command = [sys.executable, launcher.__file__, script, *args.rest]
        command += ['--model', self.arm.model, '--seed', str(self.seed)]
        command += ['--output', str(self.folder.parent), '--experiment', self.folder.name]
        command += ['--model-kwargs', *kwargs, *self.arm.model_args]
        command += ['--device', args.device, '--device-modules', *args.device_modules, 'timm_mrla.train_hooks']
        command += ['--pretrained'] * ('.' in self.arm.model) + (['--resume', str(last)] if last.exists() else [])
        env = {**os.environ, 'CUDA_VISIBLE_DEVICES': device} if device else None
        with open(self.log_path, 'a') as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env)

    def result(self, column: str) -> dict[str, Any]:
        """The metric by epoch and what the run cost."""
        log = self.log()
        speeds = {epoch: float(speed) for epoch, _, speed in _STEP.findall(log)}
        return {
            'curve': {epoch: float(row[column]) for epoch, row in sorted(self.rows().items())},
            'parameters': int(_PARAMETERS.findall(log)[-1]),
            'images_per_second': median(speeds.values()),
            'peak_memory_mib': max(map(int, _MEMORY.findall(log)), default=None),
        }


def _results(runs: list[Run], pairs: dict[str, tuple[Arm, Arm]], metric: str) -> dict[str, Any]:
    """The numbers of all runs that came to their end, by arm and seed, and what they allow to conclude."""
    found: dict[str, dict[int, dict[str, Any]]] = {run.arm.name: {} for run in runs}
    failed = [run.name for run in runs if run.progress() < 1]
    for run in runs:
        if run.name not in failed:
            found[run.arm.name][run.seed] = run.result(f'eval_{metric}')
    if not any(found.values()):
        raise ValueError(f'no run came to its end; failed: {"; ".join(failed)}')
    last = {
        arm: {seed: [*run['curve'].values()][-1] for seed, run in by_seed.items()} for arm, by_seed in found.items()
    }

    comparisons = []
    for model, (plain, _) in pairs.items():
        ours, theirs = last[model], last[plain.name]
        seeds = sorted({*ours} & {*theirs})
        row = {'model': model, 'plain': plain.name, 'seeds': seeds}
        if len(seeds) < 2:
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
    return {'arms': arms, 'comparisons': comparisons, 'failed': failed}


def _number(value: float | None, spec: str) -> str:
    return '-' if value is None else f'{value:{spec}}'


def report(results: dict[str, Any]) -> str:
    """The results of a comparison, as they stand in its JSON file, in Markdown."""
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
    machine = {key: results[key] for key in ('date', 'device', 'python', 'torch', 'timm', 'timm-mrla')}
    parts = [
        '\n'.join(f'| {" | ".join(line)} |' for line in lines),
        *(row['conclusion'] for row in results['comparisons']),
        f'{metric} after the last epoch: mean and 95 % interval over seeds, and of the differences between runs of one '
        'seed. The intervals speak of other seeds, not of other data, and each of one model alone.',
        *([f'Failed: {"; ".join(results["failed"])}.'] if results['failed'] else []),
        f'`train.py {shlex.join(results["arguments"])}`; {"; ".join(f"{k} {v}" for k, v in machine.items())}',
    ]
    return '\n\n'.join(parts) + '\n'


def _write(path: Path, text: str) -> None:
    """Write a file in one step."""
    part = path.with_suffix('.part')
    part.write_text(text)
    os.replace(part, path)


def _claim(out: Path, comparison: dict[str, Any]) -> None:
    """Make a folder that of a comparison, or find that it is."""
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


def _check_metric(runs: list[Run], column: str) -> None:
    """Raise ValueError if runs have written results without a metric."""
    for run in runs:
        row = next(iter(run.rows().values()), {column: ''})
        if column not in row:
            written = ', '.join(name for name in row if name.startswith('eval_'))
            raise ValueError(f'train.py writes no {column}; it writes {written or "no metric at all"}')


def _train(runs: list[Run], script: str, args: argparse.Namespace, devices: Sequence[str | None], column: str) -> None:
    """Do the runs, one on each device at a time; a failed one is reported, and the others go on."""
    form = '{l_bar}{bar}| {n:.2f} of {total} runs, {elapsed} gone, {remaining} left'
    done = {run.name: run.progress() for run in runs}
    waiting, running = [run for run in runs if done[run.name] < 1], {}
    with tqdm(total=len(runs), initial=sum(done.values()), bar_format=form, smoothing=0, mininterval=1) as bar:
        try:
            while waiting or running:
                for slot, device in enumerate(devices):
                    if waiting and slot not in running:
                        run = waiting.pop(0)
                        running[slot] = run, run.start(script, args, device)
                bar.set_description(', '.join(run.name for run, _ in running.values()), refresh=False)
                time.sleep(0.5)
                for slot, (run, process) in [*running.items()]:
                    ended = process.poll() is not None
                    done[run.name] = run.progress()
                    _check_metric([run], column)
                    if ended:
                        del running[slot]
                        if done[run.name] < 1:
                            bar.write(f'{run.name} failed; the end of {run.log_path}:\n{run.log()[-2000:]}', sys.stderr)
                bar.update(sum(done.values()) - bar.n)
        finally:
            for _, process in running.values():
                process.terminate()
                process.wait()


def compare(
    script: str,
    models: list[str],
    out: str,
    train_args: list[str],
    seeds: int = 5,
    metric: str = 'top1',
    devices: Sequence[str | None] = (None,),
) -> dict[str, Any]:
    """Train models and their plain backbones once for each seed, and report what differs.

    Args:
        script: Path of timm's train.py.
        models: Entries with layer attention, also with the tag of a warm start.
        out: Folder of the comparison. One that was stopped goes on where it was.
        train_args: Further arguments of train.py, the same for all, also in a YAML file (-c). `mrla_*` among its
            --model-kwargs are not for the plain backbones.
        seeds: Number of seeds, from 0 on.
        metric: What train.py evaluates and the report is on: 'top1', 'top5' or 'loss'.
        devices: So many runs at once, each with one of these as its CUDA_VISIBLE_DEVICES, or as it is if None.

    Returns:
        What is in results.json.

    Raises:
        ValueError: An argument is wrong, train.py does not write the metric, or no run came to its end.
    """
    if not os.path.isfile(script):
        raise ValueError(
            f"there is no script {script!r}; timm's train.py is at the top of its repository, "
            'https://github.com/huggingface/pytorch-image-models'
        )
    if not re.search(rf"""['"]{re.escape(metric)}['"]""", Path(script).read_text()):
        raise ValueError(f"{script} writes no metric {metric!r}; timm's writes top1, top5 and loss")
    if seeds < 2:
        raise ValueError(f'--seeds {seeds} is less than 2, and an interval needs two')
    if not devices:
        raise ValueError('there are no devices to run on')
    args, pairs = _parse(train_args), {model: _arms(model) for model in models}
    path = Path(out)
    config = {'config': Path(args.config).read_text()} if args.config else {}
    _claim(path, {'models': models, 'arguments': train_args, **config})
    arms = dict.fromkeys(arm for pair in pairs.values() for arm in pair)
    runs = [Run(arm, seed, path / 'runs' / arm.name / str(seed)) for seed in range(seeds) for arm in arms]
    _check_metric(runs, f'eval_{metric}')
    try:
        with FileLock(path / '.lock', timeout=0):
            _train(runs, script, args, devices, f'eval_{metric}')
    except Timeout:
        raise ValueError(f'{out!r} is being worked on by another process') from None

    found = _results(runs, pairs, metric)
    results = {
        **about(args.device.partition(':')[0]),
        'train_py': script,
        'arguments': train_args,
        'metric': metric,
        'runs_at_once': len(devices),
        **found,
    }
    _write(path / 'results.json', json.dumps(results, indent=2) + '\n')
    _write(path / 'results.md', report(results))
    plot_comparison(results).savefig(path / 'results.png')
    return results
