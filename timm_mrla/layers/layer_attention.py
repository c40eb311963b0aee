"""Multi-head recurrent layer attention (MRLA).

Paper: `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985

A block t of a stage returns x, in which lies a map [B, C, H, W]. From it come, with h heads of d = C / h channels,

* the query q and the key k [B, h, d]: the channel means of the map through a 1-d convolution over the channels each,
* the value v [B, C, H, W]: the map through a 3x3 depthwise convolution,

and from these what the block retrieves:

* MRLA-base attends to all blocks s <= t of the stage: `m = sum_s a_s * v_s`, `a = softmax_s(<q_t, k_s> / sqrt(d))`,
* MRLA-light recurs on the block's shortcut o, which holds what the blocks before it retrieved:
  `m = g * v + lam * o`, `g = sigmoid(<q, k> / sqrt(d))`.

The form says where the norms are. In both, the result is added to x:

* `post`, that of the paper's ResNet, for blocks with batch norms: `x + drop_path(norm(m))`, where MRLA-base has a ReLU
  after the norm;
* `pre`, that of the paper's DeiT, for blocks with layer norms: x and o are normed before they are read, and
  `x + drop_path(m)`, where MRLA-light has a GELU on v.

The layout says how x and o hold their maps: NCHW, NHWC, or NLC, tokens [B, P + H * W, C]. Prefix tokens have no place
on the map: in the form `pre` one gets its normed self added, as in the paper's DeiT, in the form `post` nothing.
"""

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_mrla.layers.inference import InferenceBase, InferenceLight, is_foldable
from timm_mrla.layers.layout import LAYOUTS, Grid, from_map, to_map
from timm_mrla.layers.recompute import recompute
from timm_mrla.layers.weights import BaseWeights, LightWeights, Memory

FORMS = ('post', 'pre')

Norm = Callable[..., nn.Module]


class _LayerAttention(nn.Module):
    """What MRLA adds to a block. A subclass says how weights and values make m."""

    recompute = False  # what backward needs of the branch, rather than save it
    # `fused(self, *args of forward)`: its result by fused kernels, or None where they may not run; set by timm_mrla.ops
    fused: Callable[..., torch.Tensor | tuple[torch.Tensor, Memory] | None] | None = None

    def __init__(
        self,
        dim: int,
        dim_head: int,
        norm_layer: Norm,
        form: str = 'post',
        layout: str = 'NCHW',
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Number of channels, C.
            dim_head: Channels per head, d; divides dim.
            norm_layer: Norm, called with dim: in the form `post` of a map [B, C, H, W], in the form `pre` of x itself.
            form: 'post' or 'pre'.
            layout: 'NCHW', 'NHWC' or 'NLC'.
            drop_path: Stochastic depth rate of what is added to the block.

        Raises:
            ValueError: dim_head does not divide dim, or there is no such form or layout.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, value, values in (('form', form, FORMS), ('layout', layout, LAYOUTS)):
            if value not in values:
                raise ValueError(f'{name} {value!r} is none of {", ".join(values)}')
        self.form, self.layout = form, layout
        self.attn = self.weights_layer(dim, dim_head, **dd)
        self.v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.norm = norm_layer(dim, **dd) if form == 'post' else nn.Identity()
        self.norm_x = norm_layer(dim, **dd) if form == 'pre' else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def extra_repr(self) -> str:
        """What `print` says of it."""
        return f'form={self.form}, layout={self.layout}, heads={self.attn.num_heads}'

    def gates(self) -> list[nn.Parameter]:
        """The parameters that, at zero, make it add exactly nothing while a gradient still reaches them."""
        return [*self.norm.parameters(), *self.norm_x.parameters()]

    def join(self, m: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        """What is added to x, but for drop_path: a map, and to a normed prefix itself."""
        if prefix is not None and self.form == 'post':
            prefix = torch.zeros_like(prefix)
        return from_map(m, self.layout, prefix)


class MrlaLight(_LayerAttention):
    """MRLA-light, linear in the number of blocks: `x = mrla(x, o)`."""

    weights_layer = LightWeights

    def __init__(self, dim: int, dim_head: int, norm_layer: Norm, *args, norm_o=True, norm_v=None, **kwargs) -> None:
        """As MRLA-base; norm_o says to norm o before it is read in the form `pre`, norm_v makes a norm of the value."""
        super().__init__(dim, dim_head, norm_layer, *args, **kwargs)
        dd = {name: kwargs.get(name) for name in ('device', 'dtype')}
        self.norm_o = norm_layer(dim, **dd) if self.form == 'pre' and norm_o else nn.Identity()
        self.norm_v = norm_v(dim, **dd) if norm_v else nn.Identity()
        self.act_v = nn.GELU() if self.form == 'pre' else nn.Identity()
        self.lam = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lam from N(0, 1), as the paper's code does."""
        nn.init.normal_(self.lam)

    def gates(self) -> list[nn.Parameter]:
        """As above; in the form `pre` with lam, through which o passes without a norm after it."""
        return [*super().gates(), *([self.lam] if self.form == 'pre' else [])]

    def branch(self, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
        """What is added to x, but for drop_path."""
        y, prefix = to_map(self.norm_x(x), self.layout, feat_size)
        o, _ = to_map(self.norm_o(o), self.layout, feat_size)
        v = self.act_v(self.norm_v(self.v(y)))
        g = self.attn.per_channel(self.attn(y, self.v.out_channels), self.v.out_channels).to(v.dtype)
        m = g * v + self.lam.to(v.dtype)[:, None, None] * o
        return self.join(self.norm(m), prefix)

    def forward(self, x: torch.Tensor, o: torch.Tensor, feat_size: Grid = None) -> torch.Tensor:
        """
        Args:
            x: Output of the block, in the layout.
            o: Input of the block as its shortcut delivers it, of the same shape.
            feat_size: The grid (H, W) of tokens.

        Returns:
            x with what was retrieved added to it.
        """
        args = (x, o, feat_size)
        if self.fused and (out := self.fused(self, *args)) is not None:
            return out
        return x + self.drop_path(recompute(self, self.branch, *args) if self.recompute else self.branch(*args))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """This layer for inference, its batch norms folded; timm's `reparameterize_model` calls this."""
        if is_foldable(self.norm_v):
            self.v, self.norm_v = fuse_conv_bn_eval(self.v.eval(), self.norm_v.eval()), nn.Identity()
        return InferenceLight(self) if is_foldable(self.norm) else self


class MrlaBase(_LayerAttention):
    """MRLA-base, quadratic in the number of blocks: `x, memory = mrla(x, memory)`.

    The memory is passed from block to block and stored nowhere: key [B, h, d] and value [B, C, H, W] of each block of
    the stage so far, one after the other. It is empty at the start of a stage.
    """

    weights_layer = BaseWeights

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.act = nn.ReLU(inplace=True) if self.form == 'post' else nn.Identity()

    def branch(self, x: torch.Tensor, feat_size: Grid, *memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is added to x, but for drop_path, and the block's key and value."""
        y, prefix = to_map(self.norm_x(x), self.layout, feat_size)
        scores, k = self.attn(y, self.v.out_channels, memory[::2])
        v = self.v(y)
        weights, m = scores.softmax(-1), None
        for s, value in enumerate((*memory[1::2], v)):
            retrieved = self.attn.per_channel(weights[..., s], self.v.out_channels).to(v.dtype) * value
            m = retrieved if m is None else m + retrieved
        return self.join(self.act(self.norm(m)), prefix), k, v

    def forward(self, x: torch.Tensor, memory: Memory = (), feat_size: Grid = None) -> tuple[torch.Tensor, Memory]:
        """
        Args:
            x: Output of the block, in the layout.
            memory: Keys and values of the stage's blocks so far.
            feat_size: The grid (H, W) of tokens.

        Returns:
            x with what was retrieved added to it, and the memory for the next block.
        """
        if self.fused and (out := self.fused(self, x, memory, feat_size)) is not None:
            return out
        args = (x, feat_size, *memory)
        m, k, v = recompute(self, self.branch, *args) if self.recompute else self.branch(*args)
        return x + self.drop_path(m), (*memory, k, v)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """This layer for inference, its batch norm folded; timm's `reparameterize_model` calls this."""
        return InferenceBase(self) if is_foldable(self.norm) else self


def layer_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The layer attentions of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LayerAttention)}
