"""Swin Transformer V2 with MRLA-light."""

from timm.models.swin_transformer_v2 import SwinTransformerV2Block

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, {SwinTransformerV2Block: Recipe('pre', 'norm1', 'NHWC')})
