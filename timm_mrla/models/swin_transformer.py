"""Swin Transformer with MRLA-light."""

from timm.models.swin_transformer import SwinTransformerBlock

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, {SwinTransformerBlock: Recipe('pre', 'norm1', 'NHWC')})
