"""Swin Transformer with MRLA-light."""

from timm.models.swin_transformer import SwinTransformerBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaSwinTransformerBlock(LightBlock, SwinTransformerBlock, form='pre', norm='norm1', layout='NHWC'):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
