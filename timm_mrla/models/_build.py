"""Builds models with layer attention by timm's own functions, and loads only weights that fit completely."""

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import FunctionType
from typing import Any

from safetensors import SafetensorError
from timm import models
from timm.models import PretrainedCfg, list_pretrained, load_pretrained, resolve_pretrained_cfg
from timm.models._prune import adapt_model_from_file  # how timm gives a model its pruned widths; not exported
from torch import nn

from timm_mrla.layers import layer_attentions
from timm_mrla.models import _weights as weights
from timm_mrla.models._adapter import backbone_names, freeze_backbone
from timm_mrla.models._graft import BaseBlock, LightBlock, graft
from timm_mrla.state_dict import StateDict, convert_state_dict, fingerprint, fit_state_dict, listed
from timm_mrla.switches import is_on

_logger = logging.getLogger(__name__)

Kind = type[LightBlock] | type[BaseBlock]
Entrypoint = Callable[..., nn.Module]


def _resolve(*args: Any) -> PretrainedCfg:
    """Resolve a configuration as timm does, and name the file in a repository.

    Otherwise timm takes a failure of the network for a missing file, and asks for a pickle.
    """
    cfg = resolve_pretrained_cfg(*args)
    if cfg.hf_hub_id and not cfg.hf_hub_filename and (cfg.source or cfg.hf_hub_id.startswith('timm/')):
        return weights.changed(cfg, hf_hub_filename='model.safetensors', custom_load=False)
    return cfg


def _sources(
    name: str,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None,
    overlay: dict[str, Any] | None,
    saved: str,
) -> tuple[PretrainedCfg, PretrainedCfg | None]:
    """The configurations of a model's weights, and of those that its backbone starts from, if these are timm's.

    The configuration of a saved adapter has the tag of its backbone's weights, and `saved` is their fingerprint. An
    overlay that names weights, such as `file`, names the backbone's then.
    """
    names_backbone = bool(saved) and not {*(overlay or {})}.isdisjoint({'file', 'url', 'hf_hub_id'})
    cfg = _resolve(name, pretrained_cfg, None if names_backbone else overlay)
    if not pretrained:
        return cfg, None
    if not (cfg.has_weights or cfg.state_dict):
        starts = list_pretrained(f'{name}.*')
        known = f'its warm starts are {listed(starts)}' if starts else 'it has no warm start either'
        raise RuntimeError(f'No pretrained weights exist for {name}; {known}. Or use pretrained=False')
    if saved or (weights.is_warm_start(cfg) and cfg.state_dict):  # an overlay describes its own state dict
        return cfg, _resolve(name, cfg.tag, overlay if names_backbone else None)
    return cfg, cfg if weights.is_warm_start(cfg) else None


@dataclass
class _Builder:
    """Stands in for timm's `build_model_with_cfg`: adds layer attention to the model, and completes its weights."""

    graft: Callable[[nn.Module], Any] | None  # adds layer attention to a plain model; None: the model's class does
    pretrained: bool
    cfg: PretrainedCfg  # of the weights
    backbone: PretrainedCfg | None  # of the weights that the backbone starts from, if they are timm's
    saved: str  # the fingerprint of these if the weights are a saved adapter: layer attention and the classifier alone
    is_adapter: bool  # whether the model is built as an adapter
    fingerprint: str = ''  # of the backbone's weights, once an adapter has read them
    model: nn.Module | None = None  # the model, once it is built; timm may wrap it, to extract features

    def __call__(self, model_cls: Entrypoint, variant: str, *args: Any, **kwargs) -> nn.Module:
        """Call timm's `build_model_with_cfg` with the arguments that an entrypoint of timm's has for it."""
        self.filter_fn = kwargs.get('pretrained_filter_fn') or (lambda state_dict: state_dict)
        self.strict = kwargs.get('pretrained_strict', True)
        create = partial(self.create, model_cls, variant if kwargs.pop('pruned', False) else '')
        kwargs.update(pretrained_cfg=self.cfg, pretrained_filter_fn=self.fit)
        return models.build_model_with_cfg(create, variant, self.pretrained, **kwargs)

    def create(self, model_cls: Entrypoint, pruned: str, **kwargs) -> nn.Module:
        """Build the model with random weights, but a saved adapter with those of its backbone."""
        model = model_cls(**kwargs)
        model.pretrained_cfg = (self.backbone or self.cfg).to_dict()
        if pruned:
            model = adapt_model_from_file(model, pruned)
        if self.graft:
            self.graft(model)
        self.model = model
        if self.saved and self.backbone:
            try:
                load_pretrained(model, None, model.num_classes, kwargs.get('in_chans', 3), self.fit_plain, strict=False)
            except Exception as e:  # of the Hub's client, of torch, or of the check
                source = weights.weights_source(self.backbone)
                raise RuntimeError(f"the backbone's weights cannot be loaded from {source}: {e}") from e
        return model

    def filter(self, state_dict: StateDict, model: nn.Module) -> StateDict:
        """Apply timm's filter to the backbone only, because it may rename layer attention by accident."""
        plain, ours = {}, {}
        for name, tensor in state_dict.items():
            (ours if '.mrla.' in name else plain)[name] = tensor
        args = (plain, model) if len(signature(self.filter_fn).parameters) > 1 else (plain,)
        return {**self.filter_fn(*args), **ours}

    def fit(self, state_dict: StateDict, model: nn.Module) -> StateDict:
        """Convert and complete a checkpoint; raise RuntimeError if it does not fit the model."""
        state_dict = convert_state_dict(state_dict)
        if self.saved:
            own = model.state_dict()
            adapter = {**{name: own[name] for name in backbone_names(model)}, **state_dict}
            return fit_state_dict(adapter, model, self.cfg)
        if not weights.is_warm_start(self.cfg) or any('.mrla.' in name for name in state_dict):
            return fit_state_dict(self.filter(state_dict, model), model, self.cfg, self.strict)
        weights.zero_output_scales(model)
        if not self.is_adapter:
            _logger.warning(
                f'{self.cfg.architecture} starts from the plain backbone of {weights.weights_source(self.cfg)}: its '
                'layer attention is untrained and adds nothing until you train it.'
            )
        return self.fit_plain(state_dict, model)

    def fit_plain(self, state_dict: StateDict, model: nn.Module) -> StateDict:
        """Convert the weights of a plain backbone, and complete them by the layer attention that the model has.

        Raise RuntimeError if a saved adapter was trained on other weights.
        """
        cfg = self.backbone if self.saved else self.cfg
        if self.saved or self.is_adapter:
            self.fingerprint = fingerprint(state_dict, cfg)
        if self.saved and self.fingerprint != self.saved:
            raise RuntimeError(
                f'the adapter was trained on the weights {cfg.hf_hub_id}, with the fingerprint {self.saved[:12]}, and '
                f'{weights.weights_source(cfg)} has {self.fingerprint[:12]}; pretrained_cfg_overlay=dict(file=PATH) '
                'names another file'
            )
        ours = {name: tensor for name, tensor in model.state_dict().items() if '.mrla.' in name}
        return fit_state_dict({**self.filter(convert_state_dict(state_dict), model), **ours}, model, cfg, self.strict)


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


def _check_arguments(name: str, kind: Kind | None, given: Iterable[str]) -> None:
    """Raise TypeError if layer attention of a model has no such argument; it names those that exist."""
    known = {'adapter', 'recompute'} if kind else {'recompute'}
    if kind:
        module = models.model_entrypoint(name).__module__
        hosts = [host for block in kind.classes.values() if block.__module__ == module for host in block.recipe.hosts]
        for fn in (graft, *(host.convert for host in hosts)):
            known |= {p.name for p in signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for argument in given:
        if argument.startswith('mrla_') and argument.removeprefix('mrla_') not in known:
            names = ', '.join(f'mrla_{name}' for name in sorted(known))
            raise TypeError(f'{name} has no argument {argument}; its arguments of layer attention are {names}')


@contextmanager
def _explain_errors(name: str, source: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Raise ValueError with the arguments where timm asserts, and name the source of weights in errors of loading."""
    try:
        yield
    except AssertionError as e:
        reason = str(e) or traceback.extract_tb(e.__traceback__)[-1].line
        arguments = ', '.join(f'{k}={v!r}' for k, v in kwargs.items() if isinstance(v, int | float | str | tuple))
        raise ValueError(f'{name} cannot be built with {arguments}: {reason}') from e
    except (RuntimeError, OSError, SafetensorError) as e:
        if not source or source in str(e):
            raise
        raise RuntimeError(f'{name} cannot be loaded from {source}: {e}') from e


def build(
    entrypoint: Entrypoint,
    name: str,
    kind: Kind | None,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs,
) -> nn.Module:
    """Build a model with layer attention by an entrypoint of timm, and load its weights.

    kwargs may have the arguments of `graft`, as `mrla_blocks` and so on. With `mrla_recompute`, backward computes layer
    attention again instead of keeping its intermediate results. With `mrla_adapter`, everything but layer attention
    and the classifier is frozen. With `kind` None, the model builds its layer attention itself.

    Raises:
        TypeError, ValueError: An argument is wrong, also where timm asserts.
        RuntimeError: Weights cannot be downloaded or read, or do not fit.
    """
    _check_arguments(name, kind, kwargs)
    own = {k.removeprefix('mrla_'): kwargs.pop(k) for k in [*kwargs] if k.startswith('mrla_')}
    recompute, adapter = is_on('mrla_recompute', own.pop('recompute', False)), own.pop('adapter', False)
    # a saved adapter has the fingerprint of its backbone's weights in place of True
    saved = kwargs.get('pretrained_model_args', {}).get('mrla_adapter')
    saved = saved if isinstance(saved, str) else ''
    is_adapter = (saved and adapter == saved) or is_on('mrla_adapter', adapter)
    if is_adapter:
        own.setdefault('identity', True)
    add = partial(graft, kind=kind, backbone=entrypoint.__name__, **own) if kind else None
    cfg, backbone = _sources(name, pretrained, pretrained_cfg, pretrained_cfg_overlay, saved)
    builder = _Builder(add, pretrained, cfg, backbone, saved, is_adapter)
    tag = cfg.tag or ''
    with _explain_errors(name, weights.weights_source(cfg) if pretrained else '', kwargs):
        # some of timm's entrypoints depend on timm's tag
        timms = dict(pretrained=pretrained, pretrained_cfg=tag.removeprefix(weights.TAG), **kwargs)
        model = _call_with_builder(entrypoint, builder, **timms)
    if builder.model is None:
        raise ValueError(f'{name} with {kwargs} is a {type(model).__name__}, which can have no layer attention')
    for layer in layer_attentions(builder.model).values():
        layer.recompute = recompute
    if tag.startswith(weights.TAG):
        weights.drop_weights_description(model)
    return freeze_backbone(model, backbone, builder.fingerprint) if is_adapter else model
