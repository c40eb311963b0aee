from timm_mrla.layers.layer_attention import (
    BaseWeights,
    LightWeights,
    Memory,
    MrlaBase,
    MrlaLight,
    layer_attentions,
)
from timm_mrla.layers.recompute import recompute
from timm_mrla.layers.tokens import MrlaBaseTokens, MrlaLightTokens, to_map, to_tokens

__all__ = [
    'BaseWeights',
    'LightWeights',
    'Memory',
    'MrlaBase',
    'MrlaBaseTokens',
    'MrlaLight',
    'MrlaLightTokens',
    'layer_attentions',
    'recompute',
    'to_map',
    'to_tokens',
]
