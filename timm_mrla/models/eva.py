"""EVA-02, DINOv3, PE and other transformers with rotary position embedding, with MRLA-light."""

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._loops import GridHost


class MrlaEva(GridHost, Eva):
    """timm's transformer with MRLA-light."""


_recipe = Recipe('pre', 'norm1', 'NLC', hosts=(MrlaEva,))
LightBlock.define(__name__, dict.fromkeys((EvaBlock, EvaBlockPostNorm), _recipe))
