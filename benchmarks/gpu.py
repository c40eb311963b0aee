"""Tests and measures the fused kernels on a GPU: one command, less than eight minutes.

    python benchmarks/gpu.py --out FOLDER

It runs the tests of kernels, then time and memory with kernels and without. Each part is a process of its own with a
limit of time, and writes its files at once, so it stands when a later part fails. At the end, table.md and costs.png
show what was measured.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

MODELS = [
    'resnet50_mrla',
    'resnet50_mrlab',
    'convnext_tiny_mrla',
    'vit_small_patch16_224_mrla',
    'swin_tiny_patch4_window7_224_mrla',
]
HERE = Path(__file__).parent


def parts(args: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """Commands of Python and their limits in seconds, by the names of their files."""
    where = ['--device', args.device, '--dtype', 'bfloat16', '--fused', 'on', 'off']
    time = [str(HERE / 'throughput.py'), *where, '--layout', 'channels_last', '--rounds', '3', '--seconds', '0.15']
    batch, many = ['--batch-size', str(args.batch_size)], ['--models', *args.models]
    inference = ['--task', 'inference', '--how', 'eager', 'reparameterized']
    memory = [str(HERE / 'memory.py'), *where, *many, *batch]
    compiled = ['--models', args.models[0], '--how', 'compiled', *batch]
    return {
        'tests': (['-m', 'pytest', str(HERE.parent / 'tests'), '-m', 'cuda and not slow', '-q', '-n', '4'], 150),
        'training': ([*time, *many, *batch, '--task', 'training', '--how', 'eager'], 90),
        'inference': ([*time, *many, *batch, *inference], 80),
        'batch-1': ([*time, *many, '--batch-size', '1', *inference], 60),
        'memory': (memory, 40),
        'compiled': ([*time, *compiled], 60),
    }


def run(name: str, command: list[str], limit: int, out: Path) -> bool:
    """Run one part; write its log and, except for tests, its JSON file. Return whether it succeeded."""
    if name != 'tests':
        command = [*command, '--json', str(out / f'{name}.json')]
    print(f'{name}, at most {limit} seconds', flush=True)
    with (out / f'{name}.log').open('w') as log:
        try:
            return subprocess.run([sys.executable, *command], stdout=log, stderr=log, timeout=limit).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def table(out: Path) -> str:
    """A row of ratios for each model, with kernels and without, of all files that are there."""
    columns, cells = [], {}
    for path in (out / f'{name}.json' for name in ('training', 'inference', 'batch-1', 'memory', 'compiled')):
        for row in json.loads(path.read_text())['results'] if path.exists() else []:
            if 'task' in row:
                column = f'{row["task"]}, {row["how"]}, batch {row["batch_size"]}'
            else:
                column = 'saved bytes' + (', recomputed' if row['mrla_recompute'] else '')
            columns += [column] * (column not in columns)
            cells.setdefault((row['model'], row['fused']), {})[column] = f'{row["ratio"]:.2f}'
    rows = [[*key, *(row.get(column, '') for column in columns)] for key, row in cells.items()]
    lines = [f'| {" | ".join(row)} |\n' for row in (['model', 'kernels', *columns], *rows)]
    return ''.join([lines[0], '|' + '---|' * (len(columns) + 2) + '\n', *lines[1:]])


def draw(out: Path) -> None:
    """Draw the ratios of training and of folded inference that are there."""
    if measured := [str(path) for path in (out / 'training.json', out / 'inference.json') if path.exists()]:
        command = [sys.executable, str(HERE / 'ratios.py'), *measured, '--out', str(out / 'costs.png')]
        subprocess.run(command, check=True)


def main() -> None:
    """Run all parts, and exit with the names of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='folder to write')
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--device', default='cuda')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name, part in parts(args).items() if not run(name, *part, args.out)]
    (args.out / 'table.md').write_text(table(args.out))
    draw(args.out)
    if failed:
        sys.exit(f'these parts failed or took too long, their .log files say why: {", ".join(failed)}')


if __name__ == '__main__':
    main()
