"""Layer attention in few passes over memory. Importing this package makes the layers use it where it can run."""

import torch
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight
from timm_mrla.ops.inference import infer_base, infer_light
from timm_mrla.ops.reasons import path, reason, set_fused

__all__ = ['fused', 'reason', 'set_fused']


def fused(
    layer: nn.Module, x: torch.Tensor, other: torch.Tensor | Memory, feat_size: Grid = None
) -> torch.Tensor | tuple[torch.Tensor, Memory] | None:
    """Run a layer in the kernels, or without gradients with sums in place. None if neither is possible.

    other: the shortcut of MRLA-light, or the memory of MRLA-base.
    """
    how = path(layer, x, other)
    if how == 'kernels':
        from timm_mrla.ops.dispatch import run  # defines custom ops, which takes time that only users of a GPU need

        return run(layer, x, other, feat_size)
    if how == 'plain':
        return None
    return (infer_light if isinstance(layer, MrlaLight) else infer_base)(layer, x, other, feat_size)


MrlaLight.fast_path = MrlaBase.fast_path = staticmethod(fused)
