from timm_mrla.layers.inference import InferenceBase, InferenceLight
from timm_mrla.layers.layer_attention import MrlaBase, MrlaLight, layer_attentions
from timm_mrla.layers.layout import Grid, from_map, to_map
from timm_mrla.layers.recompute import recompute
from timm_mrla.layers.weights import LightWeights, Memory, per_channel

__all__ = [
    'Grid',
    'InferenceBase',
    'InferenceLight',
    'LightWeights',
    'Memory',
    'MrlaBase',
    'MrlaLight',
    'from_map',
    'layer_attentions',
    'per_channel',
    'recompute',
    'to_map',
]
