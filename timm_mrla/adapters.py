"""Layer attention as an adapter: reduces a trained model to a small file, and exchanges adapters in a model."""

import json
import logging
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn

from timm_mrla.checkpoints import read_checkpoint, read_config, saved_file
from timm_mrla.checks import explain_build_errors
from timm_mrla.models import Adapter, backbone_names, weights_source
from timm_mrla.state_dict import StateDict, listed

__all__ = ['load_adapter', 'shrink']

_logger = logging.getLogger(__name__)


def _start(model: Adapter) -> Adapter:
    """Build the model that an adapter started from: the backbone with timm's weights."""
    args = {**get_model_args(model), 'mrla_adapter': True}
    name = model.pretrained_cfg['architecture']
    return timm.create_model(name, pretrained=True, pretrained_cfg=model.backbone_weights, **args)


def shrink(model: nn.Module, state_dict: StateDict) -> tuple[StateDict, str] | None:
    """Reduce the state dict of an adapter to layer attention, the classifier and whatever else was trained.

    Args:
        model: The model.
        state_dict: Its whole state dict.

    Returns:
        The reduced state dict, and the fingerprint of the backbone's weights. None if the model is no adapter, or if
        its frozen tensors are not those of timm's weights; a warning says which of them differ.
    """
    if not isinstance(model, Adapter):
        return None
    if model.backbone_weights is None:
        why = "it does not say from which of timm's weights its backbone started, as MODEL.warmstart_TAG does"
    else:
        source = weights_source(model.backbone_weights)
        try:
            start = _start(model)
        except Exception as e:  # also errors of the Hub's client
            why = f'the weights that its backbone started from cannot be loaded: {e}'
        else:
            own, names = start.state_dict(), backbone_names(model)
            changed = {n for n in names if not torch.equal(state_dict[n].cpu(), own[n].to(state_dict[n].dtype))}
            moved = changed - {name for name, p in model.named_parameters() if p.requires_grad}
            if not moved:
                small = {name: tensor for name, tensor in state_dict.items() if name not in names - changed}
                return small, start.backbone_fingerprint
            why = f'frozen tensors of its backbone differ from {source}: {listed(sorted(moved))}'
    _logger.warning(f'The whole model is written, and not the adapter alone: {why}')
    return None


def _shape(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model that its adapters depend on, as config.json holds them."""
    args = {k: v for k, v in args.items() if k != 'num_classes' and not k.startswith(('mrla_', 'drop_', 'pretrained'))}
    return json.loads(json.dumps(args, default=str))


def load_adapter(model: nn.Module, source: str) -> None:
    """Replace layer attention and the classifier of a model by those of a saved adapter, in place.

    Several adapters can share one backbone in memory this way. The classifier gets the adapter's number of classes.

    Args:
        model: A model with `mrla_adapter=True`, or after `attach(model, adapter=True)`.
        source: The adapter, 'local-dir:FOLDER' or 'hf-hub:USER/NAME'.

    Raises:
        ValueError: The model is no adapter, or `source` contains none, or one of another model or backbone. The model
            stays as it was.
    """
    if not isinstance(model, Adapter):
        raise ValueError(f'{type(model).__name__} is no adapter: build it with mrla_adapter=True')
    config = read_config(source)
    with explain_build_errors(source, {}):  # config.json may contain anything
        cfg, args = dict(config.get('pretrained_cfg', {})), dict(config.get('model_args', {}))
        theirs, ours = _shape(args), _shape(get_model_args(model))
    expected, name = args.get('mrla_adapter'), model.pretrained_cfg.get('architecture')
    if not isinstance(expected, str):
        raise ValueError(f'{source!r} contains a whole model of {config["architecture"]}: load it by timm.create_model')
    if config['architecture'] != name or theirs != ours:
        raise ValueError(
            f'{source!r} is an adapter of {config["architecture"]} with {theirs}, and the model is {name} with {ours}'
        )
    if model.backbone_weights is not None and not model.backbone_fingerprint:
        model.backbone_fingerprint = _start(model).backbone_fingerprint
    if model.backbone_fingerprint != expected:
        raise ValueError(
            f'{source!r} was trained on weights of {cfg.get("tag")} with the fingerprint {expected[:12]}, and the '
            f"model's backbone has {model.backbone_fingerprint[:12] or 'weights of its own'}"
        )
    with explain_build_errors(source, {}):
        args = {**get_model_args(model), **args, 'num_classes': config.get('num_classes'), 'mrla_adapter': True}
        fresh = timm.create_model(name, device='meta', **args)
    state_dict = read_checkpoint(saved_file(source, 'model.safetensors'))
    frozen = backbone_names(fresh)
    needed = {n: t.shape for n, t in fresh.state_dict().items() if n not in frozen}
    found = {n: t.shape for n, t in state_dict.items()}
    if differing := [n for n in sorted({*needed, *found}) if needed.get(n) != found.get(n)]:
        raise ValueError(f'{source!r} does not fit: it has no or another {listed(differing)}')
    if fresh.num_classes != model.num_classes:
        model.reset_classifier(fresh.num_classes)
    model.load_state_dict(state_dict, strict=False)
    labels = {key: config.get(key, cfg.get(key)) for key in ('label_names', 'label_descriptions')}
    cfg = {**model.pretrained_cfg, **cfg, **labels, 'num_classes': fresh.num_classes}
    model.pretrained_cfg = model.default_cfg = cfg
