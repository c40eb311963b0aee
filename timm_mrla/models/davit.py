"""DaViT with MRLA-light. Its blocks return maps whose memory is that of tokens, and as tokens they are read here."""

import torch
from timm.models.davit import ChannelBlock, SpatialBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light


class _TokenBlock(LightBlock):
    """A block on maps, with layer attention on their tokens: on one image the sum of two maps has other strides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, o = (z.flatten(2).transpose(1, 2) for z in (super(LightBlock, self).forward(x), x))
        return self.mrla(y, o, x.shape[2:]).transpose(1, 2).view(x.shape)


class MrlaSpatialBlock(_TokenBlock, SpatialBlock, form='pre', norm='norm1', layout='NLC'):
    """timm's block with attention over windows, followed by layer attention."""


class MrlaChannelBlock(_TokenBlock, ChannelBlock, form='pre', norm='norm1', layout='NLC'):
    """timm's block with attention over channels, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
