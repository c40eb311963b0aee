"""InceptionNeXt with MRLA-light."""

from timm.models.inception_next import MetaNeXtBlock

from timm_mrla.models._graft import Recipe
from timm_mrla.models._registry import register_entries

register_entries(__name__, {MetaNeXtBlock: Recipe('post', 'norm')})
