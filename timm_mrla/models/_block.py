"""How a stage or a transformer runs blocks that hand a memory on."""

import torch
from torch import nn

from timm_mrla.layers import Memory, recompute

__all__ = ['run_block']


def run_block(block: nn.Module, *args, grad_checkpointing: bool) -> tuple[torch.Tensor, Memory]:
    """A block's output and the memory for the next block, under gradient checkpointing if asked."""
    return recompute(block, block, *args) if grad_checkpointing else block(*args)
