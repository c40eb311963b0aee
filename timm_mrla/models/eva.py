"""EVA-02, DINOv3, PE and other transformers with rotary position embedding, with MRLA-light."""

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm

from timm_mrla.models._graft import LightBlock
from timm_mrla.models._registry import register_light
from timm_mrla.models._transformer import GridHost


class MrlaEva(GridHost, Eva):
    """timm's transformer with layer attention."""


class MrlaEvaBlock(LightBlock, EvaBlock, form='pre', norm='norm1', layout='NLC', hosts=(MrlaEva,)):
    """timm's block, followed by layer attention."""


class MrlaEvaBlockPostNorm(LightBlock, EvaBlockPostNorm, form='pre', norm='norm1', layout='NLC', hosts=(MrlaEva,)):
    """timm's block with norms after its branches, followed by layer attention."""


default_cfgs = {}
register_light(__name__)
