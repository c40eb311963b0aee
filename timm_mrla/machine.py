"""What numbers were measured on."""

import datetime
import platform
from pathlib import Path

import timm
import torch

import timm_mrla

__all__ = ['about']


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def about(device: str) -> dict[str, str]:
    """The date, the machine's GPU if the device is 'cuda', else its processor, and the versions."""
    name = f'{torch.get_num_threads()} threads, {_processor()}'
    if device == 'cuda':  # no name of it is known where a comparison from another machine is looked at
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return {
        'date': datetime.date.today().isoformat(),
        'device': name,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm-mrla': timm_mrla.__version__,
    }
