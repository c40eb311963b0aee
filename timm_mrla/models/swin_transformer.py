"""Swin Transformer with MRLA-light."""

from timm.models.swin_transformer import SwinTransformerBlock

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._registry import register_models

LightBlock.define(__name__, {SwinTransformerBlock: Recipe('pre', 'norm1', 'NHWC')})
register_models(__name__)
