"""What MRLA-base needs beyond its blocks: a memory that goes from one to the next, through loops of timm's own."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from timm_mrla.layers import recompute
from timm_mrla.models._graft import Calls

__all__ = ['chain']


def chain(
    blocks: Iterable[nn.Module],
    grad_checkpointing: bool,
    depth: int | None = None,
    feat_size: tuple[int, int] | None = None,
) -> Calls:
    """Blocks of MRLA-base as functions of one tensor, to be called once each and in their order.

    Args:
        blocks: The blocks.
        grad_checkpointing: Whether backward computes each block again.
        depth: Blocks after which the memory starts anew; None for never.
        feat_size: The grid (H, W) of tokens, unless it is handed over with them.
    """
    memory = []

    def call(i: int, block: nn.Module, x: torch.Tensor, grid: tuple[int, int] | None = feat_size, **kwargs):
        if depth and i % depth == 0:
            memory.clear()
        run = partial(recompute, block, block) if grad_checkpointing else block
        x, *memory[:] = run(x, *memory, feat_size=grid, **kwargs)
        return x

    return Calls(partial(call, i, block) for i, block in enumerate(blocks))
