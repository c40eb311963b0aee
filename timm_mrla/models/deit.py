"""DeiT with multi-head recurrent layer attention (MRLA)

Papers:
* `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985
* `Training data-efficient image transformers & distillation through attention` - https://arxiv.org/abs/2012.12877
"""

from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from timm_mrla.models._graft import BaseBlock
from timm_mrla.models._loops import SelfWithOverrides, with_memory
from timm_mrla.models._registry import Recipe, register_entries
from timm_mrla.models._transformer import GridHost


class MrlaBaseVisionTransformer(GridHost, VisionTransformer):
    """timm's vision transformer with MRLA-base."""

    @classmethod
    def adopt(cls, module: nn.Module, stage_depth: int = 4) -> None:
        """Make a transformer one of this class, whose memory starts anew after stage_depth blocks."""
        if stage_depth < 1:
            raise ValueError(f'mrla_stage_depth {stage_depth} is less than 1')
        super().adopt(module)
        module.mrla_stage_depth = stage_depth

    def call(self, feat_size: tuple[int, int]) -> SelfWithOverrides:
        """What stands in for the transformer in a forward pass on a grid (H, W)."""
        blocks = with_memory(self.blocks, self.grad_checkpointing, self.mrla_stage_depth, feat_size)
        return SelfWithOverrides(self, blocks=blocks, grad_checkpointing=False)


_names = {f'{name}_patch16_224': name for name in ('deit_tiny', 'deit_small', 'deit_base')}
_distilled = {f'{name}_distilled_patch16_224': f'{name}_distilled' for name in _names.values()}

register_entries(__name__, {}, {**_names, **_distilled})  # the blocks are those of the vision transformer
blocks = {Block: Recipe('pre', 'norm1', 'NLC', hosts=(MrlaBaseVisionTransformer,))}
register_entries(__name__, blocks, _names, base=BaseBlock)
