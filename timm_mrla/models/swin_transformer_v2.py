"""Swin Transformer V2 with MRLA-light."""

from timm.models.swin_transformer_v2 import SwinTransformerV2Block

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaSwinTransformerV2Block(LightBlock, SwinTransformerV2Block, form='pre', norm='norm1', layout='NHWC'):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
