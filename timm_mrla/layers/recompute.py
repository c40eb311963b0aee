"""Saves memory in training: backward recomputes the tensors of a module, instead of keeping them from forward."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class _BuffersKept:
    """A context in which a module updates copies of its buffers, because forward has updated the statistics already.

    torch enters it at each backward pass, so it is a class: the context of a generator can be entered only once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        modules = self.module.modules()
        self.buffers = [(m, name, buffer) for m in modules for name, buffer in m.named_buffers(recurse=False)]
        for m, name, buffer in self.buffers:
            setattr(m, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for m, name, buffer in self.buffers:
            setattr(m, name, buffer)


def recompute(module: nn.Module, fn: Callable, *args, **kwargs):
    """Call `fn(*args, **kwargs)`, a part of a module's forward pass, and save only its arguments for backward.

    Batch norms update their running statistics once. With `torch.utils.checkpoint` alone, they would do so twice.
    """
    # torch.compile cannot trace a context, and needs none: its graph updates buffers in forward only
    contexts = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _BuffersKept(module))}
    return checkpoint(fn, *args, use_reentrant=False, **contexts, **kwargs)
