"""DeiT with MRLA-light and MRLA-base, as in the paper."""

from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from timm_mrla.models._graft import BaseBlock, Recipe
from timm_mrla.models._loops import GridHost, SelfWithOverrides, with_memory
from timm_mrla.models._registry import register_model


class MrlaBaseVisionTransformer(GridHost, VisionTransformer):
    """timm's vision transformer with MRLA-base."""

    @classmethod
    def convert(cls, module: nn.Module, *, stage_depth: int = 4) -> None:
        """Change the class of a transformer; its memory is emptied after every `stage_depth` blocks."""
        if stage_depth < 1:
            raise ValueError(f'mrla_stage_depth {stage_depth} is less than 1')
        super().convert(module)
        module.mrla_stage_depth = stage_depth

    def stand_in(self, feat_size: tuple[int, int]) -> SelfWithOverrides:
        """The `self` of timm's methods for one forward pass on a grid (H, W)."""
        blocks = with_memory(self.blocks, self.grad_checkpointing, self.mrla_stage_depth, feat_size)
        return SelfWithOverrides(self, blocks=blocks, grad_checkpointing=False)


BaseBlock.define(__name__, {Block: Recipe('pre', 'norm1', 'NLC', hosts=(MrlaBaseVisionTransformer,))})

# vision_transformer.py defines the blocks of MRLA-light; the paper's models have shorter names than timm's
for size in ('deit_tiny', 'deit_small', 'deit_base'):
    register_model(__name__, f'{size}_mrla', f'{size}_patch16_224')
    register_model(__name__, f'{size}_distilled_mrla', f'{size}_distilled_patch16_224')
    register_model(__name__, f'{size}_mrlab', f'{size}_patch16_224', BaseBlock)
