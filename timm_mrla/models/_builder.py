"""What the families share: registration, configuration and construction."""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, is_model, resolve_pretrained_cfg
from timm.models import register_model as timm_register_model
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models._weights import fit_state_dict, is_warm_start, source_of

__all__ = ['build_mrla', 'model_cfg', 'register_model']


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's `register_model`, except that a name which is taken stays as it is."""
    return fn if is_model(fn.__name__) else timm_register_model(fn)


def model_cfg(**kwargs) -> dict[str, Any]:
    """The configuration of a model without weights, with what all families share."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        **kwargs,
    }


def build_mrla(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_filter_fn: Callable[..., dict[str, torch.Tensor]],
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    mrla_recompute: bool = False,
    **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, strict about weights.

    With mrla_recompute, backward computes the layer attentions again, rather than save what they make.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has a bad value, also where timm asserts.
        RuntimeError: The weights cannot be had or do not fit.
    """
    # without a name, timm takes any failure of the network for a missing file, and asks for a pickle
    overlay = {'hf_hub_filename': 'model.safetensors', **(pretrained_cfg_overlay or {})}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)

    def filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        return fit_state_dict(pretrained_filter_fn(state_dict, model), model, cfg)

    try:
        model = build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg=cfg, pretrained_filter_fn=filter_fn, **kwargs
        )
    except AssertionError as e:
        reason = str(e) or traceback.extract_tb(e.__traceback__)[-1].line
        arguments = ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if isinstance(v, int | float | str | tuple))
        raise ValueError(f'{variant} cannot be built with {arguments}: {reason}') from e
    except (RuntimeError, OSError, SafetensorError) as e:
        source = source_of(cfg)
        if not pretrained or not source or source in str(e):
            raise
        raise RuntimeError(f'{variant} cannot be loaded from {source}: {e}') from e
    for layer in layer_attentions(model).values():
        layer.recompute = mrla_recompute
    if is_warm_start(cfg):
        # what is trained from here and saved is no longer what these say
        for key in ('tag', 'description', 'notes'):
            model.pretrained_cfg.pop(key, None)
    return model
