"""EdgeNeXt with MRLA-light."""

from timm.models.edgenext import ConvBlock, SplitTransposeBlock

from timm_mrla.models._graft import LightBlock, Recipe

_blocks = {
    ConvBlock: Recipe('pre', 'norm', where=lambda block: not block.shortcut_after_dw),
    SplitTransposeBlock: Recipe('pre', 'norm'),
}
LightBlock.define(__name__, _blocks)
