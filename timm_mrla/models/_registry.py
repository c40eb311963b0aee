"""Registers timm's entries with layer attention as entries of their own, and builds them."""

import re
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from types import FunctionType
from typing import Any

from safetensors import SafetensorError
from timm import models
from timm.models import PretrainedCfg
from timm.models._prune import adapt_model_from_file  # how timm gives an entry its pruned widths; not exported
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models import _weights as weights
from timm_mrla.models._adapter import freeze_backbone
from timm_mrla.models._graft import BaseBlock, LightBlock, Recipe, graft
from timm_mrla.models._loading import Loading
from timm_mrla.state_dict import StateDict, convert_state_dict
from timm_mrla.switches import is_on

BACKBONES: dict[str, str] = {}  # our entry -> timm's entry of its plain backbone
MODEL_ARGS: dict[str, dict[str, Any]] = {}  # our entry -> arguments that its backbone is built with

Kind = type[LightBlock] | type[BaseBlock] | None  # None: the model builds its layer attention itself
Entrypoint = Callable[..., nn.Module]


def register_entries(
    module: str,
    blocks: dict[type[nn.Module], Recipe],
    names: dict[str, str] | None = None,
    without: str = '',
    base: type[LightBlock] | type[BaseBlock] = LightBlock,
    warm: bool = True,
    cfg: dict[str, Any] | None = None,
    **model_args,
) -> None:
    """Register the entries of one module of timm as `ENTRY_mrla`, or as `ENTRY_mrlab` with MRLA-base.

    An entry itself has no weights. For each tag with weights of the backbone it has a tag of its own, a warm start.

    Args:
        module: `__name__` of a module of ours, which has the name of timm's module.
        blocks: How its blocks get layer attention.
        names: timm's names -> our names without ending, where they differ; with MRLA-base, all names.
        without: Pattern of timm's names without an entry, because no block has a shortcut that keeps the shape.
        base: Base class of the blocks with layer attention.
        warm: Whether the entries have warm starts.
        cfg: Values that differ from timm's configurations.
        **model_args: Arguments for timm's entries, where they differ from timm's.
    """
    base.define(module, blocks)
    name, names, cfg = module.rpartition('.')[2], names or {}, cfg or {}
    kind, ending = (BaseBlock, '_mrlab') if issubclass(base, BaseBlock) else (LightBlock, '_mrla')
    for backbone in models.list_models(module=name):
        stock, entry = models.model_entrypoint(backbone), names.get(backbone, backbone) + ending
        elsewhere = stock.__module__ != f'timm.models.{name}' or (kind is BaseBlock and backbone not in names)
        if elsewhere or re.fullmatch(without, backbone):
            continue
        default = sys.modules[stock.__module__].default_cfgs[backbone]
        cfgs = {
            f'{entry}.{weights.TAG}{tag}': weights.warm_start_cfg(default.cfgs[tag], entry, f'{backbone}.{tag}', **cfg)
            for tag in default.tags
            if warm and tag and default.cfgs[tag].has_weights
        }
        # `ENTRY.*` makes the entry itself timm's default; otherwise timm would take the first warm start
        cfgs[f'{entry}.*'] = weights.without_weights(default.default, **cfg)
        doc = f"timm's {backbone} with {kind.layer.__name__}."
        if register_entry(module, entry, stock, kind, cfgs, doc, **model_args):
            BACKBONES[entry], MODEL_ARGS[entry] = backbone, model_args


def register_entry(module: str, entry: str, stock: Entrypoint, kind: Kind, cfgs: dict, doc: str, **model_args) -> bool:
    """Register an entry that the entrypoint `stock` builds, unless its name is taken; tell whether it is registered."""
    if models.is_model(entry):
        return models.model_entrypoint(entry).__module__ == module  # this package may have been imported before

    def fn(pretrained: bool = False, **kwargs) -> nn.Module:
        return build(stock, entry, kind, pretrained, **{**model_args, **kwargs})

    fn.__name__ = fn.__qualname__ = entry
    fn.__module__, fn.__doc__ = module, doc
    scope = vars(sys.modules[module])
    scope.setdefault('default_cfgs', {}).update(models.generate_default_cfgs(cfgs))
    scope[entry] = models.register_model(fn)
    return True


def _call_with_builder(entrypoint: Entrypoint, builder: Entrypoint, **kwargs) -> nn.Module:
    """Call an entrypoint of timm whose module sees `builder` in place of `build_model_with_cfg`.

    Only the arguments of that call tell a family's class, filter of checkpoints and features.
    """
    scope = dict(entrypoint.__globals__, build_model_with_cfg=builder)
    for name, fn in entrypoint.__globals__.items():
        if isinstance(fn, FunctionType) and fn.__globals__ is entrypoint.__globals__:
            scope[name] = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
            scope[name].__kwdefaults__ = fn.__kwdefaults__
    try:
        return scope[entrypoint.__name__](**kwargs)
    finally:
        del scope['build_model_with_cfg']  # breaks the cycle of scope and functions, which would keep the model alive


def _check_arguments(entry: str, kind: Kind, given: Iterable[str]) -> None:
    """Raise TypeError if layer attention of an entry has no such argument; it names those that exist."""
    known = ['recompute']
    if kind:
        module = models.model_entrypoint(entry).__module__
        hosts = {host for cls in kind.classes.values() if cls.__module__ == module for host in cls.recipe.hosts}
        own = (name for host in hosts for name in signature(host.convert).parameters if name != 'module')
        known += ['adapter', *[*signature(graft).parameters][3:-1], *own]  # without the model and its kind and entry
    for name in given:
        if name.startswith('mrla_') and name.removeprefix('mrla_') not in known:
            names = ', '.join(f'mrla_{name}' for name in sorted(known))
            raise TypeError(f'{entry} has no argument {name}; its arguments of layer attention are {names}')


def build(
    stock: Entrypoint,
    entry: str,
    kind: Kind,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    mrla_recompute: bool = False,
    **kwargs,
) -> nn.Module:
    """Build a model with layer attention by an entrypoint of timm, and load only weights that fit completely.

    With `mrla_recompute`, backward computes layer attention again instead of keeping its intermediate results. With
    `mrla_adapter`, everything but layer attention and the classifier is frozen. kwargs may have the arguments of
    `graft`, as `mrla_blocks` and so on. A wrong argument raises TypeError or ValueError, also where timm asserts.
    Weights that cannot be downloaded or read, or do not fit, raise RuntimeError.
    """
    _check_arguments(entry, kind, kwargs)
    choice = {k.removeprefix('mrla_'): kwargs.pop(k) for k in [*kwargs] if kind and k.startswith('mrla_')}
    recompute, adapter = is_on('mrla_recompute', mrla_recompute), choice.pop('adapter', False)
    # a saved adapter has the fingerprint of its backbone's weights in place of True
    saved = kwargs.get('pretrained_model_args', {}).get('mrla_adapter')
    if is_adapter := (isinstance(saved, str) and adapter == saved) or is_on('mrla_adapter', adapter):
        choice.setdefault('identity', True)
    loading = Loading(entry, pretrained, pretrained_cfg, pretrained_cfg_overlay, kwargs, is_adapter)
    built = []

    def builder(model_cls, variant, *args, pretrained_filter_fn=None, pretrained_strict=True, pruned=False, **kwargs):
        def grafted(**kwargs) -> nn.Module:
            model = model_cls(**kwargs)
            if pruned:
                model.pretrained_cfg = loading.cfg.to_dict()
                model = adapt_model_from_file(model, variant)
            if kind:
                graft(model, kind, stock.__name__, **choice)
            for layer in layer_attentions(model).values():
                layer.recompute = recompute
            built.append(model)
            return model

        def convert(state_dict: StateDict, model: nn.Module) -> StateDict:
            state_dict = convert_state_dict(state_dict)
            if pretrained_filter_fn:
                state_dict = weights.apply_filter(pretrained_filter_fn, state_dict, model)
            return state_dict

        filters = partial(loading.fit, convert=convert, strict=pretrained_strict)
        kwargs.update(pretrained_cfg=loading.cfg, pretrained_filter_fn=filters, pretrained_strict=pretrained_strict)
        return models.build_model_with_cfg(grafted, variant, pretrained, **kwargs)

    try:
        tag = (loading.cfg.tag or '').removeprefix(weights.TAG)  # some of timm's entrypoints depend on the tag
        model = _call_with_builder(stock, builder, pretrained=pretrained, pretrained_cfg=tag, **kwargs)
    except AssertionError as e:
        reason = str(e) or traceback.extract_tb(e.__traceback__)[-1].line
        arguments = ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if isinstance(v, int | float | str | tuple))
        raise ValueError(f'{entry} cannot be built with {arguments}: {reason}') from e
    except (RuntimeError, OSError, SafetensorError) as e:
        source = weights.weights_source(loading.cfg)
        if not pretrained or not source or source in str(e):
            raise
        raise RuntimeError(f'{entry} cannot be loaded from {source}: {e}') from e
    if not built:
        raise ValueError(f'{entry} with {kwargs} is a {type(model).__name__}, which can have no layer attention')
    if weights.is_warm_start(loading.cfg):
        weights.drop_weights_description(model)
    return freeze_backbone(model, loading.backbone, loading.fingerprint) if is_adapter else model
