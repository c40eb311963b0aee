"""PVTv2 with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `PVT v2: Improved Baselines with Pyramid Vision Transformer` - https://arxiv.org/abs/2106.13797

The paper's authors released no PVTv2: this is layer attention as in their DeiT, with a memory for each stage.
"""

import torch
from timm.models.pvt_v2 import Block, PyramidVisionTransformerStage

from timm_mrla.models._base import chain
from timm_mrla.models._graft import BaseBlock, Host, LightBlock, View
from timm_mrla.models._registry import register_base, register_light


class MrlaBlock(LightBlock, Block, form='pre', norm='norm1', layout='NLC'):
    """timm's block, followed by MRLA-light."""

    def forward(self, x: torch.Tensor, feat_size: tuple[int, int]) -> torch.Tensor:
        return self.mrla(super(LightBlock, self).forward(x, feat_size), x, feat_size)


class MrlaBaseStage(Host, PyramidVisionTransformerStage):
    """timm's stage with MRLA-base."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        call = View(self, blocks=chain(self.blocks, self.grad_checkpointing), grad_checkpointing=False)
        return super().forward.__func__(call, x)


class MrlaBaseBlock(BaseBlock, Block, form='pre', norm='norm1', layout='NLC', hosts=(MrlaBaseStage,)):
    """timm's block, followed by MRLA-base."""

    def forward(self, x: torch.Tensor, *memory: torch.Tensor, feat_size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        x, memory = self.mrla(super(BaseBlock, self).forward(x, feat_size), memory, feat_size)
        return x, *memory


default_cfgs = {}
register_light(__name__)
register_base(__name__, {f'pvt_v2_b{i}': f'pvt_v2_b{i}' for i in range(2)})
