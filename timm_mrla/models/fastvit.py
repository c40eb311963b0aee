"""FastViT with MRLA-light."""

from timm.models.fastvit import AttentionBlock, RepMixerBlock

from timm_mrla.models._registry import Recipe, register_entries

register_entries(__name__, dict.fromkeys((RepMixerBlock, AttentionBlock), Recipe('post', 'mlp.conv.bn')))
