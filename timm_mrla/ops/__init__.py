"""Fused GPU kernels of layer attention. Importing this package makes the layers use them where they can run."""

from timm_mrla.layers import MrlaBase, MrlaLight
from timm_mrla.layers.inference import InferenceBase, InferenceLight
from timm_mrla.ops.dispatch import fused
from timm_mrla.ops.reasons import reason, set_fused

for layer in (MrlaLight, MrlaBase, InferenceLight, InferenceBase):
    layer.fused = staticmethod(fused)

__all__ = ['fused', 'reason', 'set_fused']
