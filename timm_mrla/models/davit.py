"""DaViT with MRLA-light."""

import torch
from timm.models.davit import ChannelBlock, SpatialBlock

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import Recipe, register_entries


class _TokenBlock(LightBlock):
    """A block on maps that lie in memory as tokens, as which layer attention reads them.

    On one image a sum of maps would lie otherwise than timm's own, and the next convolution would round otherwise.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, o = (z.flatten(2).transpose(1, 2) for z in (super(LightBlock, self).forward(x), x))
        return self.mrla(y, o, x.shape[2:]).transpose(1, 2).view(x.shape)


blocks = dict.fromkeys((SpatialBlock, ChannelBlock), Recipe('pre', 'norm1', 'NLC'))
register_entries(__name__, blocks, base=_TokenBlock)
