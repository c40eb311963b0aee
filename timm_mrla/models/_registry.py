"""Registers timm's models with layer attention under names of their own."""

import re
import sys
from collections import deque
from typing import Any

from timm import models
from timm.models import PretrainedCfg
from torch import nn

from timm_mrla.models._build import Entrypoint, Kind, build
from timm_mrla.models._graft import LightBlock
from timm_mrla.models._weights import TAG, warm_start_cfg, without_weights

BACKBONES: dict[str, str] = {}  # our model -> timm's model that is its plain backbone
MODEL_ARGS: dict[str, dict[str, Any]] = {}  # our model -> arguments that its backbone is built with

# timm's models without layer attention, because none of their blocks has a shortcut that keeps the shape
_WITHOUT = re.compile('lcnet_.*|mobilenetv1_.*|test_efficientnet(_evos|_gn|_ln)?|test_maxvit')


def register_models(module: str) -> None:
    """Register all models of a module of timm with MRLA-light, as `NAME_mrla`, in our module of the same name.

    Not those that our module has registered itself, under the names of the paper.
    """
    named = {backbone for name, backbone in BACKBONES.items() if name.endswith('_mrla')}
    timms = sys.modules.get(f'timm.models.{module}')  # timm has no CeiT
    for backbone in timms.default_cfgs if timms else ():
        if models.is_model(backbone) and backbone not in named and not _WITHOUT.fullmatch(backbone):
            register_model(f'timm_mrla.models.{module}', f'{backbone}_mrla', backbone)


def register_model(module: str, name: str, backbone: str, kind: Kind = LightBlock) -> None:
    """Register a model of timm with layer attention. For each tag with weights of timm's, it gets a warm start."""
    entrypoint = models.model_entrypoint(backbone)
    timms = sys.modules[entrypoint.__module__].default_cfgs[backbone]
    # the first is the default: without weights, because nobody has trained the model yet
    cfgs = {'': without_weights(timms.default)}
    for tag, plain in timms.cfgs.items():
        if tag and plain.has_weights:
            cfgs[f'{TAG}{tag}'] = warm_start_cfg(plain, name, f'{backbone}.{tag}')
    register_entrypoint(module, name, entrypoint, kind, cfgs)


def register_entrypoint(
    module: str, name: str, entrypoint: Entrypoint, kind: Kind | None, cfgs: dict[str, PretrainedCfg], **model_args
) -> None:
    """Register a model that an entrypoint builds with these arguments, and its configurations by tag.

    A name that is registered stays: timm may take it, or this package may have been imported before.
    """
    if not models.is_model(name):

        def fn(pretrained: bool = False, **kwargs) -> nn.Module:
            return build(entrypoint, name, kind, pretrained, **{**model_args, **kwargs})

        fn.__name__ = fn.__qualname__ = name
        fn.__module__ = module
        fn.__doc__ = f"timm's {entrypoint.__name__} with {kind.layer.__name__}." if kind else entrypoint.__doc__
        scope = vars(sys.modules[module])
        scope.setdefault('default_cfgs', {})[name] = models.DefaultCfg(deque(cfgs), cfgs)
        scope[name] = models.register_model(fn)
    if kind and models.model_entrypoint(name).__module__ == module:
        BACKBONES[name], MODEL_ARGS[name] = entrypoint.__name__, model_args
