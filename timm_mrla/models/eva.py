"""EVA-02, DINOv3, PE and other transformers with rotary position embedding, with MRLA-light."""

from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm

from timm_mrla.models._registry import Recipe, register_entries
from timm_mrla.models._transformer import GridHost, TokenBlock


class MrlaEva(GridHost, Eva):
    """timm's transformer with MRLA-light."""

    stock = Eva


blocks = dict.fromkeys((EvaBlock, EvaBlockPostNorm), Recipe('pre', 'norm1', 'NLC', hosts=(MrlaEva,)))
register_entries(__name__, blocks, base=TokenBlock)
