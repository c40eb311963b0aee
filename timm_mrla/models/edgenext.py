"""EdgeNeXt with MRLA-light."""

from timm.models.edgenext import ConvBlock, SplitTransposeBlock

from timm_mrla.models._graft import LightBlock, Recipe
from timm_mrla.models._registry import register_models

_blocks = {
    ConvBlock: Recipe('pre', 'norm', where=lambda block: not block.shortcut_after_dw),
    SplitTransposeBlock: Recipe('pre', 'norm'),
}
LightBlock.define(__name__, _blocks)
register_models(__name__)
