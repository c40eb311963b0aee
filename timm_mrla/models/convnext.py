"""ConvNeXt and ConvNeXt-V2 with MRLA-light."""

from timm.models.convnext import ConvNeXtBlock
from torch import nn

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class MrlaConvNeXtBlock(
    LightBlock,
    ConvNeXtBlock,
    form='pre',
    norm='norm',
    where=lambda block: isinstance(block.shortcut, nn.Identity),
):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
