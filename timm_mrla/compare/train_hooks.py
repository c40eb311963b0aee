"""Changes a run of train.py for `timm-mrla compare`, which passes this module to it as one of its --device-modules.

* Each epoch starts from a random state that depends on the seed and the epoch only. So all models see the images in the
  same order, also after a run was resumed.
* The run prints its peak memory at the end.
* The run ends when the process that started it ends.
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
    """Shuffles, from a new random state in each epoch."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seed = torch.initial_seed()

    def set_epoch(self, epoch: int) -> None:
        """Seed all random numbers of an epoch; train.py calls this before the epoch."""
        random_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))


def _print_peak_memory() -> None:
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    elif _STATUS.exists():
        # not getrusage: it starts with the memory of the parent process
        peak = 1024 * int(re.search(r'VmHWM:\s*(\d+)', _STATUS.read_text())[1])
    else:
        return
    print(f'Peak memory: {peak / 2**20:.0f} MiB', flush=True)


def _end_with_parent() -> None:
    os.read(0, 1)  # blocks until the parent, which writes nothing, ends and the pipe closes
    os._exit(1)


dataloader.RandomSampler = EpochSampler  # the sampler that a data loader uses for shuffle=True
atexit.register(_print_peak_memory)
threading.Thread(target=_end_with_parent, daemon=True).start()
