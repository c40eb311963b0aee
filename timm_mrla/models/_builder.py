"""What the families share: registration, configuration, construction, and the names of the authors' checkpoints."""

import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, clean_state_dict, is_model
from timm.models import register_model as timm_register_model
from torch import nn

__all__ = ['build_mrla', 'convert_state_dict', 'model_cfg', 'register_model']

# the authors' names of what MRLA adds to a block, and ours
_AUTHORS_NAMES = (
    (r'\.bn_mrla\.', '.mrla.norm.'),
    (r'\.norm_mrla\.', '.mrla.norm_x.'),
    (r'\.mrla\.norm(x|o)\.', r'.mrla.norm_\1.'),
    (r'\.mrla\.lambda_t$', '.mrla.lam'),
    (r'\.(mrla|mla)\.W(q|k)\.', r'.attn.\2.'),
    (r'\.(mrla|mla)\.Wv\.', '.v.'),
    (r'\.(mrla|mla)\.bn_v\.', '.norm_v.'),
)


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
        'license': 'apache-2.0',
        **kwargs,
    }


def build_mrla(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    """timm's `build_model_with_cfg`.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has a bad value, also where timm asserts.
    """
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    except AssertionError as e:
        reason = str(e) or traceback.extract_tb(e.__traceback__)[-1].line
        arguments = ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if isinstance(v, int | float | str | tuple))
        raise ValueError(f'{variant} cannot be built with {arguments}: {reason}') from e


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give a checkpoint of the authors' code our names; our own passes unchanged.

    Args:
        state_dict: Parameters and buffers by name, bare or under `state_dict` or `model`, with or without the prefixes
            of DistributedDataParallel and torch.compile.
    """
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict.get('model', state_dict)))
    out = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _AUTHORS_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor.flatten() if name.endswith('.mrla.lam') else tensor
    return out
