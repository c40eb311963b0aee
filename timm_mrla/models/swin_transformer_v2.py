"""Swin Transformer V2 with MRLA-light."""

from timm.models.swin_transformer_v2 import SwinTransformerV2Block

from timm_mrla.models._graft import LightBlock, Recipe

LightBlock.define(__name__, {SwinTransformerV2Block: Recipe('pre', 'norm1', 'NHWC')})
