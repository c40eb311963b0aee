"""MambaOut with MRLA-light."""

from timm.models.mambaout import GatedConvBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaGatedConvBlock(LightBlock, GatedConvBlock, form='pre', norm='norm', layout='NHWC'):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
