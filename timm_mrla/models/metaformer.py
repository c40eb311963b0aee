"""MetaFormer, PoolFormer among them, with MRLA-light. CAFormer's last two stages are tokens."""

from timm.models.metaformer import MetaFormerBlock, MetaFormerStage
from torch import Tensor, nn

from timm_mrla.models._graft import Host, LightBlock, View
from timm_mrla.models._registry import register_light
from timm_mrla.models._transformer import with_grid


class MrlaMetaFormerStage(Host, MetaFormerStage):
    """timm's stage, the grid of its tokens handed to its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.use_nchw:
            return super().forward(x)
        x = self.downsample(x)
        call = View(self, downsample=nn.Identity(), blocks=with_grid(self.blocks, x.shape[-2:]))
        return super().forward.__func__(call, x)


class MrlaMetaFormerBlock(
    LightBlock,
    MetaFormerBlock,
    form='pre',
    norm='norm1',
    layout=lambda block: 'NCHW' if isinstance(block.mlp.fc1, nn.Conv2d) else 'NLC',
    hosts=(MrlaMetaFormerStage,),
):
    """timm's block, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
