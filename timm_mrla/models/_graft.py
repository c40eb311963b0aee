"""Layer attention for models of timm's whose constructors take no block: timm builds them, then they are grafted."""

import copy
from collections.abc import Callable

from torch import nn

__all__ = ['graft', 'like']


def graft(module: nn.Module, cls: type[nn.Module], **children: nn.Module) -> None:
    """Make a built module one of a subclass that adds to its forward pass, and give it the children that this calls.

    Its parameters keep their names, so that checkpoints of the stock model and timm's filters for them still fit.
    """
    module.__class__ = cls
    for name, child in children.items():
        module.add_module(name, child)


def like(norm: nn.Module) -> Callable[..., nn.Module]:
    """A layer that builds norms like a fresh one of the model, with its arguments."""
    return lambda *args, **kwargs: copy.deepcopy(norm)
