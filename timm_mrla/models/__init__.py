"""Models of timm with layer attention. A file with the name of a module of timm says how the blocks there get it."""

# ruff: noqa: F401
from importlib import import_module
from pkgutil import iter_modules

from timm_mrla.models._adapter import Adapter, backbone_names, classifier_names
from timm_mrla.models._attach import attach, sites
from timm_mrla.models._graft import is_lost
from timm_mrla.models._loops import SelfWithOverrides
from timm_mrla.models._registry import BACKBONES, MODEL_ARGS, register_models
from timm_mrla.models._weights import TAG, weights_source

__all__ = ['attach', 'sites']

for file in iter_modules(__path__):
    if not file.name.startswith('_'):
        import_module(f'{__name__}.{file.name}')
        register_models(file.name)
