"""timm's own loops over blocks, made to hand on what they don't know of: a grid of tokens, the memory of MRLA-base."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from timm_mrla.layers import Grid, recompute


class View:
    """A module as one call of a method of timm's sees it: with other attributes, which the module itself never has."""

    def __init__(self, module: nn.Module, **attributes) -> None:
        self.__dict__.update(attributes, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Calls(list):
    """Functions in the place of an `nn.Sequential`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for call in self:
            x = call(x)
        return x


def with_grid(blocks: nn.Module, feat_size: tuple[int, int]) -> Calls:
    """Blocks as functions of tokens, the grid (H, W) handed to those that have layer attention."""
    return Calls(partial(b, feat_size=feat_size) if hasattr(b, 'mrla') else b for b in blocks)


def with_memory(
    blocks: Iterable[nn.Module], grad_checkpointing: bool, depth: int | None = None, feat_size: Grid = None
) -> Calls:
    """Blocks of MRLA-base as functions of one tensor, to be called once each and in their order.

    The memory starts anew after depth blocks, if given; the grid (H, W) of tokens may also be handed over with them.
    """
    memory = []

    def call(i: int, block: nn.Module, x: torch.Tensor, grid: Grid = feat_size, **kwargs):
        if depth and i % depth == 0:
            memory.clear()
        run = partial(recompute, block, block) if grad_checkpointing else block
        x, *memory[:] = run(x, *memory, feat_size=grid, **kwargs)
        return x

    return Calls(partial(call, i, block) for i, block in enumerate(blocks))
