"""Runs timm's train.py for each arm and seed, and reads what it wrote."""

import argparse
import csv
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from timm_mrla.compare.arms import Arm

# `timm-mrla run` as a script, which runs in a process of its own and is not imported here
_LAUNCHER = Path(__file__).parents[1] / 'cli' / 'launcher.py'

# lines in the log of train.py
_EPOCHS = re.compile(r'Scheduled epochs: (\d+)')
_STEP = re.compile(r'Train: (\d+) \[.*?\( *(\d+)%\).*?\( *[\d.]+s, +([\d.]+)/s\)')  # epoch, percent of it, images/s
_PARAMETERS = re.compile(r'param count: *(\d+)')
_MEMORY = re.compile(r'Peak memory: (\d+) MiB')  # printed by train_hooks


@dataclass
class Run:
    """A run of train.py for one arm and one seed, in its own folder."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """The arm and the seed."""
        return f'{self.arm.name}, seed {self.seed}'

    @property
    def log_path(self) -> Path:
        """The file with the output of train.py."""
        return self.folder / 'log.txt'

    def log(self) -> str:
        """The output of train.py so far."""
        return self.log_path.read_text(errors='replace') if self.log_path.exists() else ''

    def rows(self) -> dict[int, dict[str, float]]:
        """Rows of train.py's summary.csv so far, by epoch. A resumed run repeats the header, which is skipped.

        Raises:
            ValueError: The file is not as train.py writes it.
        """
        path = self.folder / 'summary.csv'
        if not path.exists():
            return {}
        try:
            with open(path, newline='') as f:
                rows = [row for row in csv.DictReader(f) if row['epoch'] != 'epoch']
            return {int(row.pop('epoch')): {name: float(value) for name, value in row.items()} for row in rows}
        except (ValueError, TypeError, LookupError, csv.Error) as e:  # a file may contain anything
            raise ValueError(f'{str(path)!r} is not what train.py writes: {e}; remove {str(self.folder)!r}') from e

    def diverged(self) -> bool:
        """Whether a loss or a metric is not finite in some epoch."""
        return not all(math.isfinite(value) for row in self.rows().values() for value in row.values())

    def progress(self) -> float:
        """The finished part of the run, in [0, 1]; 1 only once the last epoch is in summary.csv."""
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
        command = [sys.executable, str(_LAUNCHER), script, *args.rest]
        command += ['--model', self.arm.model, '--seed', str(self.seed)]
        command += ['--output', str(self.folder.parent), '--experiment', self.folder.name]
        command += ['--model-kwargs', *self.arm.kwargs(args.model_kwargs)]
        command += ['--device', args.device, '--device-modules', *args.device_modules, 'timm_mrla.compare.train_hooks']
        command += ['--pretrained'] * ('.' in self.arm.model) + (['--resume', str(last)] if last.exists() else [])
        env = {**os.environ, 'CUDA_VISIBLE_DEVICES': device} if device else None
        with open(self.log_path, 'a') as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env)

    def result(self) -> dict[str, Any]:
        """The columns of summary.csv by epoch, and the cost of the run."""
        log, rows = self.log(), sorted(self.rows().items())
        speeds = {epoch: float(speed) for epoch, _, speed in _STEP.findall(log)}
        return {
            'curves': {name: {epoch: row[name] for epoch, row in rows} for name in rows[0][1]},
            'parameters': max(map(int, _PARAMETERS.findall(log)), default=None),
            'images_per_second': median(speeds.values()),
            'peak_memory_mib': max(map(int, _MEMORY.findall(log)), default=None),
        }


def check_metric(runs: list[Run], column: str) -> None:
    """Raise ValueError if a run has written its first epoch without this column."""
    for run in runs:
        row = next(iter(run.rows().values()), {column: 0.0})
        if column not in row:
            written = ', '.join(name for name in row if name.startswith('eval_'))
            raise ValueError(f'train.py writes no {column}; it writes {written or "no metric at all"}')


def train_all(
    runs: list[Run], script: str, args: argparse.Namespace, devices: Sequence[str | None], column: str
) -> None:
    """Do the runs, one at a time on each device. If one fails, print the end of its log and go on with the others."""
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
                    check_metric([run], column)
                    if ended:
                        del running[slot]
                        if done[run.name] < 1:
                            bar.write(f'{run.name} failed; the end of {run.log_path}:\n{run.log()[-2000:]}', sys.stderr)
                bar.update(sum(done.values()) - bar.n)
        finally:
            for _, process in running.values():
                process.terminate()
                process.wait()
