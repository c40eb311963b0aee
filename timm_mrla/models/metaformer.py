"""MetaFormer, also PoolFormer and CAFormer, with MRLA-light. The last two stages of CAFormer work on tokens."""

from timm.models.metaformer import MetaFormerBlock, MetaFormerStage
from torch import Tensor, nn

from timm_mrla.models._graft import Host, LightBlock, Recipe
from timm_mrla.models._loops import SelfWithOverrides, with_grid


class MrlaMetaFormerStage(Host, MetaFormerStage):
    """timm's stage, which passes the grid of its tokens to its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.use_nchw:
            return super().forward(x)
        x = self.downsample(x)
        call = SelfWithOverrides(self, downsample=lambda x: x, blocks=with_grid(self.blocks, x.shape[-2:]))
        return self.stock.forward(call, x)


def _layout(block: nn.Module) -> str:
    return 'NCHW' if isinstance(block.mlp.fc1, nn.Conv2d) else 'NLC'


LightBlock.define(__name__, {MetaFormerBlock: Recipe('pre', 'norm1', _layout, hosts=(MrlaMetaFormerStage,))})
