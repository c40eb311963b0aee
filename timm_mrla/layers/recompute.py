"""Saves memory in training: backward recomputes the tensors of a module, instead of keeping them from forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Let a module update copies of its buffers, because forward has updated the running statistics already."""
    buffers = [(m, name, buffer) for m in module.modules() for name, buffer in m.named_buffers(recurse=False)]
    for m, name, buffer in buffers:
        setattr(m, name, buffer.clone())
    try:
        yield
    finally:
        for m, name, buffer in buffers:
            setattr(m, name, buffer)


def recompute(module: nn.Module, fn: Callable, *args, **kwargs):
    """Call `fn(*args, **kwargs)`, a part of a module's forward pass, and save only its arguments for backward.

    Batch norms update their running statistics once. With `torch.utils.checkpoint` alone, they would do so twice.
    """
    # torch.compile cannot trace a context, and needs none: its graph updates buffers in forward only
    contexts = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _buffers_kept(module))}
    return checkpoint(fn, *args, use_reentrant=False, **contexts, **kwargs)
