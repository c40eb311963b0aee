"""Reads saved models, and checkpoints that a training script wrote, timm's or the paper's, and loads them."""

import json
import os
import textwrap
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.layers import to_2tuple, to_ntuple
from timm.models import PretrainedCfg, get_pretrained_cfg, load_state_dict
from torch import nn

from timm_mrla.checks import check_checkpoint, check_model_name, explain_build_errors
from timm_mrla.state_dict import StateDict, convert_state_dict

__all__ = ['load_checkpoint', 'read_checkpoint', 'read_config', 'saved_file']


def saved_file(name: str, file: str) -> str:
    """The path of a file in a folder or in a repository of the Hub, which is downloaded."""
    if not name.startswith('hf-hub:'):
        return os.path.join(name.removeprefix('local-dir:'), file)
    repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
    return hf_hub_download(repo_id, file, revision=revision or None)


def read_config(name: str) -> dict[str, Any]:
    """Read config.json from a folder or a repository of the Hub."""
    try:
        config = json.loads(Path(saved_file(name, 'config.json')).read_text())
    except OSError as e:
        raise ValueError(f'{name!r} holds no model: {e}') from e
    except ValueError as e:
        raise ValueError(f'{name!r} holds no model: its config.json cannot be read: {e}') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError(f'{name!r} holds no model: its config.json names no architecture')
    return config


def read_checkpoint(path: str) -> StateDict:
    """Read the state dict in a checkpoint, without running any code from the file.

    Warns if a weight is not finite, because training may have diverged.

    Raises:
        ValueError: There is no such file, or it contains more than weights, or none.
    """
    check_checkpoint(path)
    try:
        state_dict = convert_state_dict(load_state_dict(path))
    except Exception as e:  # a file may contain anything
        reason = '. '.join(str(e).split('. ')[:2])  # the rest of torch's message is about loading code
        raise ValueError(f'{path!r} cannot be read as weights alone: {type(e).__name__}: {reason}') from e
    if not state_dict:
        raise ValueError(f'{path!r} holds no weights: its state dict is empty')
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor) and not tensor.float().isfinite().all():
            warnings.warn(f'{path!r} has values in {name} that are not finite', stacklevel=2)
            break
    return state_dict


def _config(model_name: str) -> PretrainedCfg:
    """The configuration of a model, in the registry or in a folder or repository."""
    if ':' not in model_name:
        check_model_name(model_name)
        return get_pretrained_cfg(model_name)
    with explain_build_errors(model_name, {}):
        return PretrainedCfg(**timm.create_model(model_name, device='meta').pretrained_cfg)


def load_checkpoint(path: str, model_name: str, /, **model_kwargs) -> nn.Module:
    """Build a model and load a checkpoint of timm's training script or of the paper's into it.

    As in timm, averaged (EMA) weights are preferred if the checkpoint has them. No code from the file is run.

    Args:
        path: The file, in torch's or safetensors' format: a state dict, bare or with optimizer and epoch beside it.
        model_name: Name of the model in timm's registry, or a `local-dir:` or `hf-hub:` name, whose configuration and
            arguments are taken.
        **model_kwargs: Arguments of `timm.create_model` that the model was trained with. The number of classes is read
            from the checkpoint.

    Raises:
        ValueError: There is no such model or file, the file contains more than weights, or the weights do not fit. Or
            the checkpoint has a position embedding and img_size is missing: 144 positions may be 12 x 12 or 8 x 18.
    """
    cfg = _config(model_name)
    state_dict = read_checkpoint(path)
    if any(name.startswith('backbone.body.') for name in state_dict):
        raise ValueError(f'{path!r} contains a detector, not {model_name}: pass it as `weights` to timm_mrla.detection')

    saved = ':' in model_name  # with its own size
    if not saved and 'img_size' not in model_kwargs and getattr(state_dict.get('pos_embed'), 'ndim', 0) == 3:
        raise ValueError(
            f'{path!r} does not say for which size its pos_embed is; give the img_size, such as img_size=224'
        )
    classifier = to_ntuple(1)(cfg.classifier)[0]
    if f'{classifier}.weight' in state_dict:
        model_kwargs.setdefault('num_classes', len(state_dict[f'{classifier}.weight']))
    channels, *size = cfg.input_size
    overlay = {
        'state_dict': state_dict,
        'source': None,  # otherwise timm loads the weights of the folder or repository
        'num_classes': model_kwargs.get('num_classes', 1000),
        # the checkpoint's own: timm infers the grid of its position embedding from it
        'input_size': (model_kwargs.get('in_chans', channels), *to_2tuple(model_kwargs.get('img_size', size))),
    }
    try:
        with explain_build_errors(cfg.architecture, model_kwargs):
            model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **model_kwargs)
    except RuntimeError as e:
        reason = textwrap.shorten(str(e.__cause__ or e), 800, placeholder=' ...')  # torch names each parameter
        raise ValueError(f'{path!r} does not fit: {reason}') from e
    for name, tensor in model.state_dict().items():
        if name in state_dict and state_dict[name].shape != tensor.shape:
            shapes = f'{tuple(state_dict[name].shape)} and not {tuple(tensor.shape)}'
            raise ValueError(
                f'{path!r} does not fit: its {name} is {shapes}; give the img_size and in_chans of its training'
            )
    del model.pretrained_cfg['state_dict']
    return model
