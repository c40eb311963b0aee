"""Adds layer attention to a model of timm's: finds the blocks that support it, and changes their class.

A block becomes an instance of a subclass, which calls timm's forward pass and then layer attention, its child `mrla`.
The names of the backbone's parameters stay, so checkpoints, layer decay and feature extraction work as before.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from timm import layers
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight, layer_attentions
from timm_mrla.models._weights import zero_output_scales
from timm_mrla.switches import is_on

# norms over the last dimension; timm has each for maps [B, C, H, W], too, as NAME2d
_NORMS = (nn.LayerNorm, layers.LayerNorm, layers.RmsNorm, layers.SimpleNorm)


class Site(NamedTuple):
    """A block, and the layer attention that it supports, or the reason why it supports none."""

    name: str
    block: str
    channels: int | None
    form: str
    layout: str
    reason: str = ''


class Sites(list[Site]):
    """The blocks of a model in their order; printed, a table."""

    def __repr__(self) -> str:
        w, v = (max((len(site[i]) for site in self), default=0) for i in (0, 1))
        rows = [f'{"block":{w}}  {"class":{v}}  channels  form  layout']
        for name, block, channels, form, layout, reason in self:
            what = f'none: {reason}' if reason else f'{channels:8}  {form:4}  {layout}'
            rows.append(f'{name:{w}}  {block:{v}}  {what}')
        return '\n'.join(rows)


class Host:
    """Base of classes that hold blocks and pass them arguments that timm does not pass; a class of timm's follows."""

    stock: type[nn.Module]  # timm's class

    def __init_subclass__(cls) -> None:
        cls.stock = cls.__mro__[cls.__mro__.index(Host) + 1]

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Change the class of a module of timm's to this class."""
        module.__class__ = cls

    @staticmethod
    def unsupported(module: nn.Module) -> str:
        """The reason why the blocks of a module support no layer attention; empty if they do."""
        return ''


@dataclass(frozen=True)
class Recipe:
    """How the blocks of a class get layer attention."""

    form: str  # of the layer
    norm: str | Callable[[nn.Module], nn.Module]  # name of a norm of the block's width, or a function of the block
    layout: str | Callable[[nn.Module], str] = 'NCHW'  # of the block's output, or a function of the block
    where: Callable[[nn.Module], bool] = lambda block: True  # whether its shortcut keeps the shape
    hosts: tuple[type[Host], ...] = ()  # classes for the module that holds the blocks, if they need one
    takes_grid: bool = False  # whether timm's block itself takes the grid of its tokens, after x
    num_heads: int | None = None  # if it divides the width; by default, heads are as wide as the form allows
    init_v: Callable[[torch.Tensor], Any] | None = None  # of the value's convolution in the paper, if not torch's
    not_in: tuple[str, ...] = ()  # models of timm whose blocks of this class have none in the paper

    def norm_of(self, block: nn.Module) -> nn.Module:
        """The norm of a block."""
        return block.get_submodule(self.norm) if isinstance(self.norm, str) else self.norm(block)


class _Block:
    """Base of blocks with layer attention; a class of timm's blocks follows."""

    stock: type[nn.Module]  # timm's class
    recipe: Recipe
    layer: type[nn.Module]
    max_dim_head: dict[str, int]  # by form
    classes: dict[type[nn.Module], type['_Block']]  # timm's class -> ours

    @classmethod
    def define(cls, module: str, recipes: dict[type[nn.Module], Recipe]) -> None:
        """Define a subclass for each class of timm's, in a module of ours, where pickle finds it."""
        for block, recipe in recipes.items():
            doc = f"timm's {block.__name__}, followed by {cls.layer.__name__}."
            name = cls.layer.__name__.removesuffix('Light') + block.__name__
            ours = type(name, (cls, block), {'__module__': module, '__doc__': doc, 'stock': block, 'recipe': recipe})
            setattr(sys.modules[module], name, ours)
            cls.classes[block] = ours

    @classmethod
    def host_of(cls, owner: nn.Module) -> type[Host] | None:
        """The host class that a module has or can get."""
        hosts = cls.recipe.hosts
        return next((host for host in hosts if isinstance(owner, host) or type(owner) is host.stock), None)

    @classmethod
    def site(cls, name: str, block: nn.Module, owner: nn.Module, backbone: str) -> Site:
        """Describe a block of timm's model `backbone`, which is in a list of blocks of the module `owner`."""
        recipe, host = cls.recipe, cls.host_of(owner)
        weight = getattr(recipe.norm_of(block), 'weight', None)
        if backbone in recipe.not_in:
            reason = 'in the paper it has none'
        elif recipe.hosts and host is None:
            reason = f'{type(owner).__name__} does not tell it the grid of its tokens'
        elif host and host.unsupported(owner):
            reason = host.unsupported(owner)
        elif not recipe.where(block):
            reason = 'it has no shortcut that keeps the shape'
        else:
            reason = 'its norm has no weight that could be zero' if weight is None else ''
        channels = None if weight is None else len(weight)
        layout = recipe.layout if isinstance(recipe.layout, str) else recipe.layout(block)
        return Site(name, cls.stock.__name__, channels, recipe.form, layout, reason)

    @classmethod
    def convert(cls, block: nn.Module, site: Site, drop_path: float | None) -> None:
        """Change the class of a block of timm's to this class, and add layer attention."""
        recipe, dd, dim = cls.recipe, layers.get_device_dtype(block), site.channels
        heads, most = recipe.num_heads, cls.max_dim_head[site.form]
        dim_head = dim // math.gcd(dim, heads) if heads else max(d for d in range(1, most + 1) if dim % d == 0)
        if drop_path is None:
            own = [m.drop_prob for m in block.modules() if isinstance(m, layers.DropPath)]
            drop_path = own[-1] if own and site.form == 'post' else 0.0
        norm_layer = partial(_new_norm, recipe.norm_of(block), site.form == 'post' or site.layout == 'NCHW')
        mrla = cls.layer(dim, dim_head, norm_layer, site.form, site.layout, drop_path=drop_path, **dd)
        if recipe.init_v:
            recipe.init_v(mrla.v.weight)
        if site.layout == 'NLC':
            mrla.num_prefix_tokens = 0  # a host with prefix tokens sets their number
        block.__class__, block.grafted = cls, True
        block.mrla = mrla.train(block.training)


def _contiguous_if_frozen(norm: nn.GroupNorm, args: tuple[torch.Tensor]) -> torch.Tensor:
    """Before 2.14, torch crashes on a CPU in the gradient of a group norm whose channels_last input needs none."""
    is_frozen = not isinstance(args[0], torch.fx.Proxy) and torch.is_grad_enabled() and not args[0].requires_grad
    return args[0].contiguous() if is_frozen else args[0]


def _new_norm(norm: nn.Module, on_maps: bool, dim: int, device=None, dtype=None) -> nn.Module:
    """Build a new norm like one of the block's, without activation."""
    if on_maps and type(norm) in _NORMS:
        return getattr(layers, f'{type(norm).__name__}2d')(dim, eps=norm.eps, device=device, dtype=dtype)
    if not [*norm.parameters()]:  # a frozen batch norm has none, but the new one must learn
        return nn.BatchNorm2d(dim, eps=norm.eps, device=device, dtype=dtype)
    # deepcopy gets the copies of the tensors, because it cannot copy those that a FakeTensorMode made
    copies = {id(p): nn.Parameter(p.detach().clone()) for p in norm.parameters()}
    fresh = copy.deepcopy(norm, {**copies, **{id(buffer): buffer.clone() for buffer in norm.buffers()}})
    if hasattr(fresh, 'act'):
        fresh.act = nn.Identity()
    if isinstance(fresh, nn.GroupNorm):
        fresh.register_forward_pre_hook(_contiguous_if_frozen)
    if getattr(fresh, 'bias', None) is None:  # torch 2.9 cannot reset a norm without bias
        nn.init.ones_(fresh.weight)
    else:
        fresh.reset_parameters()
    return fresh


class LightBlock(_Block):
    """A block with MRLA-light: `x = block(x)`."""

    layer, max_dim_head, classes = MrlaLight, {'post': 32, 'pre': 16}, {}

    def forward(self, x: torch.Tensor, *args, feat_size: Grid = None, **kwargs) -> torch.Tensor:
        if self.recipe.takes_grid:
            args = args or (feat_size,)
            feat_size = args[0]
        return self.mrla(super().forward(x, *args, **kwargs), x, feat_size)


class BaseBlock(_Block):
    """A block with MRLA-base: `x, *memory = block(x, *memory)`; checkpointing cannot see tensors in nested tuples."""

    layer, max_dim_head, classes = MrlaBase, {'post': 16, 'pre': 16}, {}

    def forward(self, x: torch.Tensor, *memory: torch.Tensor, feat_size: Grid = None, **kwargs) -> Memory:
        if isinstance(x, tuple):
            raise TypeError(
                'a block of MRLA-base passes its memory on: x, *memory = block(x, *memory, feat_size=...); a wrapper '
                'gets the memory if it has the attribute `mrla` of its block'
            )
        args = (feat_size,) if self.recipe.takes_grid else ()
        x, memory = self.mrla(super().forward(x, *args, **kwargs), memory, feat_size)
        return x, *memory


def is_lost(block: nn.Module) -> bool:
    """Whether a block lost its layer attention, because somebody changed its class after it was grafted."""
    return 'grafted' in vars(block) and not isinstance(block, _Block)


def _check_methods(name: str, module: nn.Module, cls: type[nn.Module]) -> None:
    """Raise ValueError if the module itself has a method that would hide one of the class that it is about to get."""
    ours = {k for c in cls.__mro__[: cls.__mro__.index(cls.stock)] for k, v in vars(c).items() if callable(v)}
    if hidden := sorted(ours & vars(module).keys()):
        raise ValueError(
            f'{hidden[0]} of {name or type(module).__name__} was replaced, so layer attention would never run: attach '
            f"first, and let the new {hidden[0]} call the old one (`del module.{hidden[0]}` restores timm's)"
        )


def _owner(name: str) -> str:
    """The name of the module that a block's list belongs to: 'stages.1' for 'stages.1.blocks.0'."""
    return name.rpartition('.')[0].rpartition('.')[0]


def find_sites(model: nn.Module, kind: type[_Block], backbone: str) -> Sites:
    """List the blocks of timm's model `backbone`, and the layer attention of a kind that they support or have."""
    sites, modules, last = Sites(), dict(model.named_modules()), None
    for name, block in modules.items():
        if is_lost(block):
            reason = 'its class was changed after it got layer attention, which never runs'
            sites.append(Site(name, type(block).__name__, None, '', '', reason))
            continue
        cls = type(block) if isinstance(block, kind) else kind.classes.get(type(block))
        if cls is not None and not (last and name.startswith(f'{last}.')):
            sites.append(cls.site(name, block, modules[_owner(name)], backbone))
            last = name
    return sites


def _choose(found: Sites, patterns: list[str] | None, kind: type[_Block], title: str) -> list[Site]:
    """The sites that match a pattern; ValueError if there are none, or if a pattern matches none."""
    sites = [site for site in found if not site.reason]
    if not found:
        known = ', '.join(sorted({cls.__module__.rpartition('.')[2] for cls in kind.classes.values()}))
        raise ValueError(f'{title} has no block that can have layer attention; known are those of timm.models: {known}')
    if not sites:
        raise ValueError(f'no block of {title} can have layer attention: {found[0].name}: {found[0].reason}')
    if patterns is None:
        return sites
    for pattern in patterns or ['']:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ValueError(
                f'{pattern!r} matches no block of {title} that can have layer attention; these can: '
                f'{sites[0].name} to {sites[-1].name}, and timm_mrla.sites(model) lists them all'
            )
    return [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]


def graft(
    model: nn.Module,
    kind: type[_Block],
    backbone: str,
    *,
    blocks: str | Iterable[str] | None = None,
    identity: bool = False,
    without: str | None = None,
    drop_path: float | None = None,
    **host_args,
) -> list[str] | None:
    """Add layer attention of a kind to the supported blocks of a model, timm's model `backbone`, in place.

    `blocks` are patterns of names, by default of all blocks; they are returned as a list. `identity` makes layer
    attention add exactly nothing until it is trained. `without` is a part of the layer, 'v' or 'lam', that is zero and
    stays zero, for ablations. `drop_path` is by default the block's own in the form `post`, else 0. `host_args` go to
    the hosts.
    """
    identity = is_on('mrla_identity', identity)
    parts = {'v': 'v.weight', 'lam': 'lam'} if kind.layer is MrlaLight else {}
    if without is not None and without not in parts:
        raise ValueError(f'mrla_without {without!r} is no part of {kind.layer.__name__}; MRLA-light has v and lam')
    if drop_path is not None and not 0.0 <= drop_path < 1.0:
        raise ValueError(f'mrla_drop_path {drop_path} is not in [0, 1)')
    if blocks is not None:
        given, blocks = blocks, [*blocks] if isinstance(blocks, Iterable) and not isinstance(blocks, str) else [blocks]
        if not all(isinstance(pattern, str) for pattern in blocks):
            raise TypeError(f"blocks {given!r:.80} are no patterns of names of blocks, such as 'stages.2.*'")
    title = backbone or type(model).__name__
    modules, hosts = dict(model.named_modules()), {}
    chosen = _choose(find_sites(model, kind, backbone), blocks, kind, title)
    for site in chosen:
        block, owner = modules[site.name], modules[_owner(site.name)]
        cls = kind.classes[type(block)]
        _check_methods(site.name, block, cls)
        if host := cls.host_of(owner):
            _check_methods(_owner(site.name), owner, host)
            hosts[owner] = host
    for site in chosen:
        kind.classes[type(modules[site.name])].convert(modules[site.name], site, drop_path)
    for owner, host in hosts.items():
        host.convert(owner, **host_args)
    if identity:
        zero_output_scales(model)
    if without:
        for layer in layer_attentions(model).values():
            nn.init.zeros_(layer.get_parameter(parts[without]).requires_grad_(False))
    return blocks
