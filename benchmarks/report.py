"""What the benchmarks print: the machine, the versions, the date, and a table."""

import datetime
import json
import platform
from pathlib import Path

import timm
import torch

import timm_mrla

__all__ = ['report']


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def report(rows: list[dict[str, object]], device: str, path: str | None) -> None:
    """Print rows of one set of keys as a table, below what they were measured on; write all of it as JSON to a path."""
    about = {
        'date': datetime.date.today().isoformat(),
        'device': torch.cuda.get_device_name()
        if device == 'cuda'
        else f'{torch.get_num_threads()} threads, {_processor()}',
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm-mrla': timm_mrla.__version__,
    }
    print('\n' + '; '.join(f'{key} {value}' for key, value in about.items()) + '\n')
    print('| ' + ' | '.join(rows[0]) + ' |\n|' + '---|' * len(rows[0]))
    for row in rows:
        print('| ' + ' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values()) + ' |')
    if path:
        Path(path).write_text(json.dumps({**about, 'results': rows}, indent=2) + '\n')
