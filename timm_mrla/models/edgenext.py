"""EdgeNeXt with MRLA-light."""

from timm.models.edgenext import ConvBlock, SplitTransposeBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaConvBlock(LightBlock, ConvBlock, form='pre', norm='norm', where=lambda block: not block.shortcut_after_dw):
    """timm's convolutional block, followed by layer attention."""


class MrlaSplitTransposeBlock(LightBlock, SplitTransposeBlock, form='pre', norm='norm'):
    """timm's block with attention over channels, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
