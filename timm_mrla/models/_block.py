"""How a stage or a transformer runs blocks that hand a memory on."""

import torch
from timm.models import checkpoint
from torch import nn

from timm_mrla.layers import Memory

__all__ = ['run_block']


def run_block(block: nn.Module, *args, grad_checkpointing: bool) -> tuple[torch.Tensor, Memory]:
    """A block's output and the memory for the next block, under gradient checkpointing if asked."""
    if grad_checkpointing:
        # the reentrant form passes no gradient to the tensors of a list
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
