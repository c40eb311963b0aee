"""timm's entries with layer attention as entries of their own: registration, configuration and construction."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    list_models,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from timm.models import register_model as timm_register_model
from timm.models._prune import adapt_model_from_file  # how timm gives an entry its pruned widths; not exported
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models import _weights as weights
from timm_mrla.models._graft import BaseBlock, LightBlock, Recipe, graft

__all__ = ['BACKBONES', 'build', 'register_entries', 'register_model']

BACKBONES: dict[str, str] = {}  # our entries -> timm's entries that they are built from


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's `register_model`, except that a name which is taken stays as it is."""
    return fn if is_model(fn.__name__) else timm_register_model(fn)


def register_entries(
    module: str,
    blocks: dict[type[nn.Module], Recipe],
    names: dict[str, str] | None = None,
    base: type[LightBlock] | type[BaseBlock] = LightBlock,
    **kwargs,
) -> None:
    """Register the entries of the module of timm's that has the name of ours, as `ENTRY_mrla` or `ENTRY_mrlab`.

    Args:
        module: `__name__` of a module of ours.
        blocks: How the blocks of its models get layer attention.
        names: Names of ours, without ending, where they are not timm's; of MRLA-base, those that have it.
        base: What the classes of these blocks are made with.
        **kwargs: warm, filter_fn, model_args and cfg, as below.
    """
    base.define(module, blocks)
    name, names = module.rpartition('.')[2], names or {}
    kind, ending = (BaseBlock, '_mrlab') if issubclass(base, BaseBlock) else (LightBlock, '_mrla')
    for backbone in list_models(module=name):
        is_timms = model_entrypoint(backbone).__module__ == f'timm.models.{name}'
        if is_timms and (kind is LightBlock or backbone in names):
            _register(module, names.get(backbone, backbone) + ending, backbone, kind, **kwargs)


def _register(
    module: str,
    entry: str,
    backbone: str,
    kind: type,
    warm: bool = True,
    filter_fn: Callable[..., dict[str, torch.Tensor]] | None = None,
    model_args: dict[str, Any] | None = None,
    **cfg,
) -> None:
    """Register one entry, with the configurations of timm's and what cfg says otherwise.

    The entry itself has no weights: each tag of the backbone's is a tag of its own, a warm start, if warm. filter_fn
    comes before timm's filter of checkpoints, and model_args are arguments of timm's entry.
    """
    scope, stock = sys.modules[module], model_entrypoint(backbone)

    def fn(pretrained: bool = False, **kwargs) -> nn.Module:
        return build(stock, entry, kind, pretrained, filter_fn, **{**(model_args or {}), **kwargs})

    fn.__name__ = fn.__qualname__ = entry
    fn.__module__ = module
    fn.__doc__ = f"timm's {backbone} with MRLA-{'light' if kind is LightBlock else 'base'}."
    default = sys.modules[stock.__module__].default_cfgs[backbone]
    cfgs = {
        f'{entry}.{weights.TAG}{tag}': replace(
            weights.warm_start_cfg(default.cfgs[tag], entry, f'{backbone}.{tag}'), **cfg
        )
        for tag in default.tags
        if warm and tag and default.cfgs[tag].has_weights
    }
    # timm makes the first tag with weights the default, unless the entry itself follows as `ENTRY.*`: nobody gets a
    # warm start without asking for it
    cfgs[f'{entry}.*'] = replace(weights.without_weights(default.default), **cfg)
    vars(scope).setdefault('default_cfgs', {}).update(generate_default_cfgs(cfgs))
    setattr(scope, entry, fn)
    register_model(fn)
    BACKBONES[entry] = backbone


def _with_builder(entrypoint: Callable[..., nn.Module], builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """An entrypoint of timm's, for which the functions of its module call another `build_model_with_cfg`.

    What a family gives that function, its class, filter of checkpoints and features, is to be had nowhere else.
    """
    scope = dict(entrypoint.__globals__, build_model_with_cfg=builder)
    for name, fn in entrypoint.__globals__.items():
        if isinstance(fn, FunctionType) and fn.__globals__ is entrypoint.__globals__:
            scope[name] = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
            scope[name].__kwdefaults__ = fn.__kwdefaults__
    return scope[entrypoint.__name__]


def build(
    stock: Callable[..., nn.Module],
    entry: str,
    kind: type[LightBlock] | type[BaseBlock] | None,
    pretrained: bool,
    filter_fn: Callable[..., dict[str, torch.Tensor]] | None = None,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    mrla_recompute: bool = False,
    **kwargs,
) -> nn.Module:
    """Build a model as an entrypoint of timm's does, with layer attention, and strict about weights.

    Args:
        stock: timm's entrypoint.
        entry: Our entry.
        kind: LightBlock or BaseBlock; None if the entrypoint builds its layer attention itself.
        pretrained: Load weights, those of pretrained_cfg and pretrained_cfg_overlay, which are as in timm.
        filter_fn: Filter of checkpoints, before timm's.
        mrla_recompute: Backward computes the layer attentions again, rather than save what they make.
        **kwargs: Arguments of the entrypoint; unless kind is None, also those of `graft`, as `mrla_blocks` and so on.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has a bad value, also where timm asserts.
        RuntimeError: The weights cannot be had or do not fit.
    """
    ours = [name for name in kwargs if kind and name.startswith('mrla_')]
    choice = {name.removeprefix('mrla_'): kwargs.pop(name) for name in ours}
    cfg = resolve_pretrained_cfg(entry, pretrained_cfg, pretrained_cfg_overlay)
    if cfg.hf_hub_id and not cfg.hf_hub_filename and (cfg.source or cfg.hf_hub_id.startswith('timm/')):
        # without a name, timm takes any failure of the network for a missing file, and asks for a pickle
        cfg = replace(cfg, hf_hub_filename='model.safetensors', custom_load=False)
    built = []

    def builder(
        model_cls: Callable[..., nn.Module],
        variant: str,
        *args,
        pretrained_filter_fn: Callable[..., dict[str, torch.Tensor]] | None = None,
        pretrained_strict: bool = True,
        pruned: bool = False,
        **kwargs,
    ) -> nn.Module:
        def grafted(**kwargs) -> nn.Module:
            model = model_cls(**kwargs)
            if pruned:
                model.pretrained_cfg = cfg.to_dict()
                model = adapt_model_from_file(model, variant)
            if kind:
                graft(model, kind, stock.__name__, **choice)
            for layer in layer_attentions(model).values():
                layer.recompute = mrla_recompute
            built.append(model)
            return model

        def filters(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
            state_dict = weights.convert_state_dict(state_dict)
            if filter_fn:
                state_dict = filter_fn(state_dict)
            if pretrained_filter_fn:
                state_dict = weights.apply_filter(pretrained_filter_fn, state_dict, model)
            return weights.fit_state_dict(state_dict, model, cfg, pretrained_strict)

        kwargs.update(pretrained_cfg=cfg, pretrained_filter_fn=filters, pretrained_strict=pretrained_strict)
        return build_model_with_cfg(grafted, variant, pretrained, **kwargs)

    try:
        # some of timm's functions look at the tag
        tag = (cfg.tag or '').removeprefix(weights.TAG)
        model = _with_builder(stock, builder)(pretrained=pretrained, pretrained_cfg=tag, **kwargs)
    except AssertionError as e:
        reason = str(e) or traceback.extract_tb(e.__traceback__)[-1].line
        arguments = ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if isinstance(v, int | float | str | tuple))
        raise ValueError(f'{entry} cannot be built with {arguments}: {reason}') from e
    except (RuntimeError, OSError, SafetensorError) as e:
        source = weights.source_of(cfg)
        if not pretrained or not source or source in str(e):
            raise
        raise RuntimeError(f'{entry} cannot be loaded from {source}: {e}') from e
    if not built:
        raise ValueError(f'{entry} with {kwargs} is a {type(model).__name__}, which can have no layer attention')
    if weights.is_warm_start(cfg):
        weights.forget_source(model)
    return model
