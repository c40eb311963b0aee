"""ConvNeXt and ConvNeXt-V2 with MRLA-light."""

from timm.models.convnext import ConvNeXtBlock
from torch import nn

from timm_mrla.models._graft import LightBlock, Recipe

_blocks = {ConvNeXtBlock: Recipe('pre', 'norm', where=lambda block: isinstance(block.shortcut, nn.Identity))}
LightBlock.define(__name__, _blocks)
