"""Layer attention in a model that timm built: which of its blocks can have it, and how they get it.

A block becomes one of a subclass that calls layer attention after timm's own forward pass, and gets a child `mrla`. The
names of the backbone's parameters stay, and with them checkpoints, filters, layer decay and feature extraction.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from timm import layers
from torch import nn

from timm_mrla.layers import Grid, Memory, MrlaBase, MrlaLight
from timm_mrla.models._weights import start_as_backbone

# norms over the last dimension -> their like for maps [B, C, H, W]
_LIKE = {
    nn.LayerNorm: layers.LayerNorm2d,
    layers.LayerNorm: layers.LayerNorm2d,
    layers.RmsNorm: layers.RmsNorm2d,
    layers.SimpleNorm: layers.SimpleNorm2d,
}


class Site(NamedTuple):
    """A block, and the layer attention that it can have, or why it can have none."""

    name: str
    block: str
    channels: int | None
    form: str
    layout: str
    reason: str = ''


class Sites(list[Site]):
    """The blocks of a model in their order; printed, a table."""

    def __str__(self) -> str:
        w, v = (max((len(site[i]) for site in self), default=0) for i in (0, 1))
        rows = [f'{"block":{w}}  {"class":{v}}  channels  form  layout']
        for name, block, channels, form, layout, reason in self:
            what = f'none: {reason}' if reason else f'{channels:8}  {form:4}  {layout}'
            rows.append(f'{name:{w}}  {block:{v}}  {what}')
        return '\n'.join(rows)

    __repr__ = __str__


class Host:
    """Before a class of timm's among the bases: what holds the blocks, and hands them what timm's own does not."""

    stock: type[nn.Module]  # timm's class

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, 'stock') and not issubclass(cls.__bases__[-1], Host):  # others make subclasses too: FSDP
            cls.stock = cls.__bases__[-1]

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Make a module of timm's class one of this class."""
        module.__class__ = cls

    @staticmethod
    def refusal(module: nn.Module) -> str:
        """Why its blocks can have no layer attention; empty if they can."""
        return ''


@dataclass(frozen=True)
class Recipe:
    """How the blocks of a class get layer attention.

    Args:
        form: Form of the layer.
        norm: Name of a norm of the block's width, which the norms of the layer are like, or a function of the block.
        layout: Layout of what the block returns, or a function of the block.
        where: Whether a block has a shortcut that keeps the shape.
        hosts: What must hold the blocks.
        num_heads: Heads, if the width can be divided so; by default a head is as wide as the form allows.
        init_v: Initialization of the value's convolution in the paper's code, where it is not torch's.
        not_in: timm's entries where these blocks have none in the paper.
    """

    form: str
    norm: str | Callable[[nn.Module], nn.Module]
    layout: str | Callable[[nn.Module], str] = 'NCHW'
    where: Callable[[nn.Module], bool] = lambda block: True
    hosts: tuple[type[Host], ...] = ()
    num_heads: int | None = None
    init_v: Callable[[torch.Tensor], Any] | None = None
    not_in: tuple[str, ...] = ()

    def norm_of(self, block: nn.Module) -> nn.Module:
        """The norm of a block."""
        return block.get_submodule(self.norm) if isinstance(self.norm, str) else self.norm(block)


class _Block:
    """Before a class of timm's blocks among the bases: the block, followed by layer attention."""

    stock: type[nn.Module]  # timm's class
    recipe: Recipe
    layer: type[nn.Module]
    prefix: str
    max_dim_head: dict[str, int]
    classes: dict[type[nn.Module], type['_Block']]  # by timm's

    @classmethod
    def define(cls, module: str, recipes: dict[type[nn.Module], Recipe]) -> None:
        """Make a class of this one and of each of timm's, in a module of ours, where pickle finds it."""
        for block, recipe in recipes.items():
            doc = f"timm's {block.__name__}, followed by {cls.layer.__name__}."
            name = cls.prefix + block.__name__
            ours = type(name, (cls, block), {'__module__': module, '__doc__': doc, 'stock': block, 'recipe': recipe})
            setattr(sys.modules[module], name, ours)
            cls.classes[block] = ours

    @classmethod
    def host_of(cls, owner: nn.Module) -> type[Host] | None:
        """The host that a module is or can become."""
        hosts = cls.recipe.hosts
        return next((host for host in hosts if isinstance(owner, host) or type(owner) is host.stock), None)

    @classmethod
    def site(cls, name: str, block: nn.Module, owner: nn.Module, entry: str) -> Site:
        """A block, in the module that holds its list of blocks, as a site."""
        recipe, host = cls.recipe, cls.host_of(owner)
        weight = getattr(recipe.norm_of(block), 'weight', None)
        if entry in recipe.not_in:
            reason = 'in the paper it has none'
        elif recipe.hosts and host is None:
            reason = f'{type(owner).__name__} does not tell it the grid of its tokens'
        elif host and host.refusal(owner):
            reason = host.refusal(owner)
        elif not recipe.where(block):
            reason = 'it has no shortcut that keeps the shape'
        else:
            reason = 'its norm has no weight that could be zero' if weight is None else ''
        channels = None if weight is None else len(weight)
        layout = recipe.layout if isinstance(recipe.layout, str) else recipe.layout(block)
        return Site(name, cls.stock.__name__, channels, recipe.form, layout, reason)

    @classmethod
    def graft(cls, block: nn.Module, site: Site, drop_path: float | None) -> None:
        """Make a block one of this class."""
        recipe, dd, dim = cls.recipe, layers.get_device_dtype(block), site.channels
        if recipe.num_heads:
            dim_head = dim // math.gcd(dim, recipe.num_heads)
        else:
            dim_head = max(d for d in range(1, cls.max_dim_head[site.form] + 1) if dim % d == 0)
        if drop_path is None:
            own = [m.drop_prob for m in block.modules() if isinstance(m, layers.DropPath)]
            drop_path = own[-1] if own and site.form == 'post' else 0.0
        norm_layer = _like(recipe.norm_of(block), on_maps=site.form == 'post' or site.layout == 'NCHW')
        mrla = cls.layer(dim, dim_head, norm_layer, site.form, site.layout, drop_path=drop_path, **dd)
        if recipe.init_v:
            recipe.init_v(mrla.v.weight)
        block.__class__ = cls
        block.mrla = mrla.train(block.training)


def _like(norm: nn.Module, on_maps: bool) -> Callable[..., nn.Module]:
    """A layer that builds norms like one of the model's: fresh, and without activation."""

    def build(dim: int, device=None, dtype=None) -> nn.Module:
        if on_maps and type(norm) in _LIKE:
            return _LIKE[type(norm)](dim, eps=norm.eps, device=device, dtype=dtype)
        if not any(True for _ in norm.parameters()):  # a batch norm that was frozen; this one must learn
            return nn.BatchNorm2d(dim, eps=norm.eps, device=device, dtype=dtype)
        fresh = copy.deepcopy(norm).requires_grad_()
        if hasattr(fresh, 'act'):
            fresh.act = nn.Identity()
        if getattr(fresh, 'bias', None) is None:  # torch 2.9 cannot reset a norm without bias
            nn.init.ones_(fresh.weight)
        else:
            fresh.reset_parameters()
        return fresh

    return build


class LightBlock(_Block):
    """With MRLA-light: tensor in, tensor out."""

    layer, prefix, max_dim_head, classes = MrlaLight, 'Mrla', {'post': 32, 'pre': 16}, {}

    def forward(self, x: torch.Tensor, *args, feat_size: Grid = None, **kwargs) -> torch.Tensor:
        return self.mrla(super().forward(x, *args, **kwargs), x, feat_size)


class BaseBlock(_Block):
    """With MRLA-base: `x, *memory = block(x, *memory)`, since checkpointing sees no tensors that are nested."""

    layer, prefix, max_dim_head, classes = MrlaBase, 'MrlaBase', {'post': 16, 'pre': 16}, {}

    def forward(self, x: torch.Tensor, *memory: torch.Tensor, feat_size: Grid = None, **kwargs) -> Memory:
        if isinstance(x, tuple):
            raise TypeError('a block of MRLA-base passes its memory on: x, *memory = block(x, *memory, feat_size=...)')
        x, memory = self.mrla(super().forward(x, **kwargs), memory, feat_size)
        return x, *memory


def _owner(name: str) -> str:
    """The name of what holds the list of blocks that a block is in."""
    return name.rpartition('.')[0].rpartition('.')[0]


def find_sites(model: nn.Module, kind: type[_Block], entry: str) -> Sites:
    """The blocks of a model, one of timm's entries, and the layer attention of a kind that they can have or have."""
    sites, modules, last = Sites(), dict(model.named_modules()), None
    for name, block in modules.items():
        cls = type(block) if isinstance(block, kind) else kind.classes.get(type(block))
        if cls is not None and not (last and name.startswith(f'{last}.')):
            sites.append(cls.site(name, block, modules[_owner(name)], entry))
            last = name
    return sites


def graft(
    model: nn.Module,
    kind: type[_Block],
    entry: str,
    blocks: str | Iterable[str] | None = None,
    identity: bool = False,
    drop_path: float | None = None,
    **host_args,
) -> None:
    """Give layer attention of a kind to the blocks of a model, one of timm's entries, that can have it.

    blocks are patterns of names of blocks, all by default; with identity it adds exactly nothing until it is trained;
    drop_path is by default that of the block in the form `post`, else 0; host_args go to what holds the blocks. A bad
    choice raises ValueError, an unknown argument TypeError.
    """
    if drop_path is not None and not 0.0 <= drop_path < 1.0:
        raise ValueError(f'mrla_drop_path {drop_path} is not in [0, 1)')
    found = find_sites(model, kind, entry)
    sites = [site for site in found if not site.reason]
    title = entry or type(model).__name__
    if not found:
        known = ', '.join(sorted({cls.__module__.rpartition('.')[2] for cls in kind.classes.values()}))
        raise ValueError(f'{title} has no block that can have layer attention; known are those of timm.models: {known}')
    if not sites:
        raise ValueError(f'no block of {title} can have layer attention: {found[0].name}: {found[0].reason}')
    if blocks is not None:
        patterns = [blocks] if isinstance(blocks, str) else [*blocks]
        for pattern in patterns or ['']:
            if not any(fnmatchcase(site.name, pattern) for site in sites):
                raise ValueError(
                    f'{pattern!r} matches no block of {title} that can have layer attention; these can: '
                    f'{sites[0].name} to {sites[-1].name}, and timm_mrla.sites(model) lists them all'
                )
        sites = [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]

    modules, hosts = dict(model.named_modules()), {}
    for site in sites:
        block, owner = modules[site.name], modules[_owner(site.name)]
        cls = kind.classes[type(block)]
        cls.graft(block, site, drop_path)
        if host := cls.host_of(owner):
            hosts[owner] = host
    for owner, host in hosts.items():
        host.adopt(owner, **host_args)
    if identity:
        start_as_backbone(model)
    if host_args and not hosts:
        raise TypeError(f'{title} has no arguments {", ".join(f"mrla_{name}" for name in host_args)}')
