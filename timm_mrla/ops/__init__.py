"""Fused GPU kernels of layer attention. Importing this package makes the layers use them where they can run."""

import torch
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight
from timm_mrla.layers.inference import InferenceBase, InferenceLight
from timm_mrla.ops.reasons import reason, set_fused

__all__ = ['fused', 'reason', 'set_fused']


def fused(
    layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory, feat_size: Grid = None
) -> torch.Tensor | tuple[torch.Tensor, Memory] | None:
    """Run a layer in the kernels, or return None if they cannot run. other: the shortcut (light), the memory (base)."""
    if reason(layer, x, other, feat_size):
        return None
    from timm_mrla.ops.dispatch import run  # defines custom ops, which takes time that only users of a GPU need

    return run(layer, x, other, feat_size)


for layer in (MrlaLight, MrlaBase, InferenceLight, InferenceBase):
    layer.fused = staticmethod(fused)
