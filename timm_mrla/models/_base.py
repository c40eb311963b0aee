"""What MRLA-base needs beyond its blocks: a memory that goes from one to the next, through loops of timm's own."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from timm_mrla.layers import recompute
from timm_mrla.models._graft import Calls

__all__ = ['chain']


class _Chain:
    def __init__(self, grad_checkpointing: bool, depth: int | None, feat_size: tuple[int, int] | None) -> None:
        self.grad_checkpointing, self.depth, self.feat_size = grad_checkpointing, depth, feat_size
        self.memory = ()

    def call(
        self,
        i: int,
        block: nn.Module,
        x: torch.Tensor,
        feat_size: tuple[int, int] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.depth and i % self.depth == 0:
            self.memory = ()
        kwargs['feat_size'] = feat_size or self.feat_size
        if self.grad_checkpointing:
            x, *self.memory = recompute(block, block, x, *self.memory, **kwargs)
        else:
            x, *self.memory = block(x, *self.memory, **kwargs)
        return x


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
    state = _Chain(grad_checkpointing, depth, feat_size)
    return Calls(partial(state.call, i, block) for i, block in enumerate(blocks))
