"""PVTv2 with MRLA-light and MRLA-base, as in the paper's DeiT, because the authors released no PVTv2."""

from functools import partial

import torch
from timm.models.pvt_v2 import Block, PyramidVisionTransformerStage

from timm_mrla.models._graft import BaseBlock, Host, LightBlock, Recipe
from timm_mrla.models._loops import SelfWithOverrides, with_memory
from timm_mrla.models._registry import register_model


class MrlaBaseStage(Host, PyramidVisionTransformerStage):
    """timm's stage with MRLA-base, and a memory of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = with_memory(self.blocks, self.grad_checkpointing)
        return self.stock.forward(SelfWithOverrides(self, blocks=blocks, grad_checkpointing=False), x)


_recipe = partial(Recipe, 'pre', 'norm1', 'NLC', takes_grid=True)

LightBlock.define(__name__, {Block: _recipe()})
BaseBlock.define(__name__, {Block: _recipe(hosts=(MrlaBaseStage,))})
for name in ('pvt_v2_b0', 'pvt_v2_b1'):
    register_model(__name__, f'{name}_mrlab', name, BaseBlock)
