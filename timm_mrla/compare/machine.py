"""Describes the machine and the software of a measurement."""

import datetime
import platform
from pathlib import Path

import timm
import torch

from timm_mrla._version import __version__

__all__ = ['describe_machine']


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(device: str) -> dict[str, str]:
    """The date, the versions, and the name of the GPU if the device is 'cuda', else of the processor."""
    name = f'{torch.get_num_threads()} threads, {_processor()}'
    if device == 'cuda':  # a finished comparison may be reported on another machine, without a GPU
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    return {
        'date': datetime.date.today().isoformat(),
        'device': name,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm-mrla': __version__,
    }
