"""Vision Transformer with MRLA-light."""

from timm.models import VisionTransformer, VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light
from timm_mrla.models._transformer import GridHost


class MrlaVisionTransformer(GridHost, VisionTransformer):
    """timm's vision transformer with layer attention."""


class MrlaVisionTransformerDistilled(GridHost, VisionTransformerDistilled):
    """timm's distilled vision transformer with layer attention."""


_recipe = dict(form='pre', layout='NLC', hosts=(MrlaVisionTransformer, MrlaVisionTransformerDistilled))


class MrlaBlock(LightBlock, Block, norm='norm1', **_recipe):
    """timm's block, followed by layer attention."""


class MrlaResPostBlock(LightBlock, ResPostBlock, norm='norm1', **_recipe):
    """timm's block with norms after its branches, followed by layer attention."""


class MrlaParallelScalingBlock(LightBlock, ParallelScalingBlock, norm='in_norm', **_recipe):
    """timm's block with attention and MLP side by side, followed by layer attention."""


class MrlaDiffParallelScalingBlock(LightBlock, DiffParallelScalingBlock, norm='in_norm', **_recipe):
    """timm's block with differential attention and MLP side by side, followed by layer attention."""


class MrlaParallelThingsBlock(LightBlock, ParallelThingsBlock, norm='attns.0.norm', **_recipe):
    """timm's block with several attentions and MLPs side by side, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
