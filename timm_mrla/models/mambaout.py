"""MambaOut with MRLA-light."""

from timm.models.mambaout import GatedConvBlock

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, {GatedConvBlock: Recipe('pre', 'norm', 'NHWC')})
