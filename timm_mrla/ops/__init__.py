from timm_mrla.layers import MrlaLight
from timm_mrla.layers.inference import InferenceLight
from timm_mrla.ops.dispatch import fused, reason, set_fused

MrlaLight.fused = InferenceLight.fused = staticmethod(fused)

__all__ = ['fused', 'reason', 'set_fused']
