"""Starts models from the weights of timm's plain backbones."""

from functools import partial
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg, is_model_pretrained
from torch import nn

from timm_mrla.layers import MrlaBase, layer_attentions

TAG = 'warmstart_'


def changed(cfg: PretrainedCfg, **values: Any) -> PretrainedCfg:
    """A copy of a configuration with other values, in a fifth of the time of `dataclasses.replace`."""
    new = object.__new__(type(cfg))
    vars(new).update(vars(cfg), **values)
    return new


def without_weights(cfg: PretrainedCfg, **values: Any) -> PretrainedCfg:
    """A configuration of timm's without its weights and their description, and with other values."""
    keys = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'tag', 'license', 'description', 'origin_url', 'notes')
    return changed(cfg, architecture=None, custom_load=False, **dict.fromkeys(keys), **values)


def warm_start_cfg(cfg: PretrainedCfg, name: str, source: str) -> PretrainedCfg:
    """The configuration that starts a model from timm's weights `source` of its backbone."""
    return changed(
        cfg,
        url=None if cfg.hf_hub_id else cfg.url,  # timm prefers the Hub if there are both
        hf_hub_id=f'timm/{source}' if cfg.hf_hub_id == 'timm/' else cfg.hf_hub_id,
        architecture=None,
        tag=None,
        description=f"A start for training {name}: timm's weights of {source}, layer attention untrained.",
        notes=(f'Layer attention adds exactly nothing yet: until it is trained, this computes {source}.',),
    )


def is_warm_start(cfg: PretrainedCfg) -> bool:
    """Whether a configuration is a warm start; one that was saved with a trained model is none."""
    return (cfg.tag or '').startswith(TAG) and not cfg.source


def backbone_cfg(name: str, cfg: dict[str, Any]) -> PretrainedCfg | None:
    """The warm start of a model with the weights of a plain timm model, by its configuration; None if there is none.

    The weights are in the model's own file, if it was given one.
    """
    name = f'{name}.{TAG}{cfg.get("tag")}'
    if not is_model_pretrained(name):
        return None
    return changed(get_pretrained_cfg(name), file=None if cfg.get('source') else cfg.get('file'))


def weights_source(cfg: PretrainedCfg) -> str:
    """The place that timm loads the weights of a configuration from; empty if there is none."""
    return 'the given state dict' if cfg.state_dict else str(cfg.file or cfg.hf_hub_id or '')


def drop_weights_description(model: nn.Module) -> None:
    """Drop the description of the plain backbone's weights, which is wrong once the model is trained."""
    for key in ('tag', 'description', 'notes'):
        model.pretrained_cfg.pop(key, None)


def _exclude_mrla(spec: Any) -> Any:
    """Make a pattern of names, or each pattern of a list, match no name of layer attention."""
    if isinstance(spec, list | tuple):
        return [(_exclude_mrla(pattern), suffix) for pattern, suffix in spec]
    return spec and rf'(?!.*\.mrla\.)(?:{spec})'


def _group_matcher(groups: dict[bool, dict[str, Any]], coarse: bool = False) -> dict[str, Any]:
    return {name: _exclude_mrla(spec) for name, spec in groups[bool(coarse)].items()}


def zero_output_scales(model: nn.Module) -> None:
    """Make layer attention add exactly nothing until it is trained, and give it the head's rate under layer decay."""
    for layer in layer_attentions(model).values():
        if isinstance(layer, MrlaBase) and layer.form == 'post':
            raise ValueError("mrla_identity True: no gradient passes the ReLU of a ResNet's MRLA-base, use False")
        for scale in layer.output_scales():
            nn.init.zeros_(scale)
    if hasattr(model, 'group_matcher'):  # a bound method would make a cycle, which keeps the model alive
        groups = {coarse: type(model).group_matcher(model, coarse) for coarse in (False, True)}
        model.group_matcher = partial(_group_matcher, groups)
