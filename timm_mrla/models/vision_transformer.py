"""Vision Transformer with MRLA-light."""

from functools import partial

from timm.models import VisionTransformer, VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from timm_mrla.models._graft import Recipe
from timm_mrla.models._registry import register_entries
from timm_mrla.models._transformer import GridHost


class MrlaVisionTransformer(GridHost, VisionTransformer):
    """timm's vision transformer with MRLA-light."""


class MrlaVisionTransformerDistilled(GridHost, VisionTransformerDistilled):
    """timm's distilled vision transformer with MRLA-light."""


_recipe = partial(Recipe, 'pre', layout='NLC', hosts=(MrlaVisionTransformer, MrlaVisionTransformerDistilled))

blocks = {
    Block: _recipe('norm1'),
    ResPostBlock: _recipe('norm1'),
    ParallelScalingBlock: _recipe('in_norm'),
    DiffParallelScalingBlock: _recipe('in_norm'),
    ParallelThingsBlock: _recipe('attns.0.norm'),
}
register_entries(__name__, blocks)
