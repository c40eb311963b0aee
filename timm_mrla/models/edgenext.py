"""EdgeNeXt with MRLA-light."""

from timm.models.edgenext import ConvBlock, SplitTransposeBlock

from timm_mrla.models._registry import Recipe, register_entries

blocks = {
    ConvBlock: Recipe('pre', 'norm', where=lambda block: not block.shortcut_after_dw),
    SplitTransposeBlock: Recipe('pre', 'norm'),
}
register_entries(__name__, blocks)
