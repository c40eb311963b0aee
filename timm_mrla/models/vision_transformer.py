"""Vision Transformer with MRLA-light."""

from functools import partial

from timm.models import VisionTransformer, VisionTransformerDistilled
from timm.models import vision_transformer as vit

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._loops import GridHost


class MrlaVisionTransformer(GridHost, VisionTransformer):
    """timm's vision transformer with MRLA-light."""


class MrlaVisionTransformerDistilled(GridHost, VisionTransformerDistilled):
    """timm's distilled vision transformer with MRLA-light."""


_recipe = partial(Recipe, 'pre', layout='NLC', hosts=(MrlaVisionTransformer, MrlaVisionTransformerDistilled))

_blocks = {
    vit.Block: _recipe('norm1'),
    vit.ResPostBlock: _recipe('norm1'),
    vit.ParallelScalingBlock: _recipe('in_norm'),
    vit.DiffParallelScalingBlock: _recipe('in_norm'),
    vit.ParallelThingsBlock: _recipe('attns.0.norm'),
}
LightBlock.define(__name__, _blocks)
