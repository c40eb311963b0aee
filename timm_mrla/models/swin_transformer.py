"""Swin Transformer with MRLA-light."""

from timm.models.swin_transformer import SwinTransformerBlock

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, {SwinTransformerBlock: Recipe('pre', 'norm1', 'NHWC')})
