"""Trading time for memory: backward computes again what it needs of a module, rather than keep it from forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, which forward has updated: copies are updated in their place."""
    buffers = [(m, name, buffer) for m in module.modules() for name, buffer in m.named_buffers(recurse=False)]
    for m, name, buffer in buffers:
        setattr(m, name, buffer.clone())
    try:
        yield
    finally:
        for m, name, buffer in buffers:
            setattr(m, name, buffer)


def recompute(module: nn.Module, fn: Callable, *args, **kwargs):
    """`fn(*args, **kwargs)`, a part of a module's forward pass, of which only the arguments are saved for backward.

    Unlike under `torch.utils.checkpoint` alone, batch norms update their running statistics once.
    """
    # compiled, the graph updates buffers in forward alone, and no context can be traced
    contexts = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _buffers_kept(module))}
    return checkpoint(fn, *args, use_reentrant=False, **contexts, **kwargs)
