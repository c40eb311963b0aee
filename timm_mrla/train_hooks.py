"""What train.py imports in a run of `timm-mrla compare`, as one of its --device-modules.

Each epoch begins from a random state that the seed and the epoch alone decide. So all models see the images in one
order, whatever else they draw, also from a checkpoint on. At its end the run tells the memory that it took, and it does
not outlive what started it.
"""

import atexit
import os
import re
import threading
from pathlib import Path

import numpy as np
import torch
from timm.utils import random_seed
from torch.utils.data import RandomSampler, dataloader

_STATUS = Path('/proc/self/status')  # Linux


class EpochSampler(RandomSampler):
    """Shuffles; train.py tells it the epoch."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seed = torch.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        random_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))


def _tell_memory() -> None:
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    elif _STATUS.exists():
        # getrusage would begin with the memory of the process that started this one
        peak = 1024 * int(re.search(r'VmHWM:\s*(\d+)', _STATUS.read_text())[1])
    else:
        return
    print(f'Peak memory: {peak / 2**20:.0f} MiB', flush=True)


def _end_with_starter() -> None:
    os.read(0, 1)  # the starter holds the other end and writes nothing
    os._exit(1)


dataloader.RandomSampler = EpochSampler  # what a data loader makes of shuffle=True
atexit.register(_tell_memory)
threading.Thread(target=_end_with_starter, daemon=True).start()
