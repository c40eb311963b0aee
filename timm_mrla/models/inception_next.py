"""InceptionNeXt with MRLA-light."""

from timm.models.inception_next import MetaNeXtBlock

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, {MetaNeXtBlock: Recipe('post', 'norm')})
