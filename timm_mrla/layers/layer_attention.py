"""Multi-head recurrent layer attention (MRLA).

Paper: `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985

Block t of a stage returns x, which contains a map [B, C, H, W]. With h heads of d = C / h channels, the layer computes

* query q and key k [B, h, d]: the channel means of the map, each through its own 1-d convolution along the channels,
* value v [B, C, H, W]: a 3x3 depthwise convolution of the map,

and retrieves m [B, C, H, W] from the blocks of the stage:

* MRLA-base attends to all blocks s <= t of the stage: `m = sum_s a_s * v_s`, `a = softmax_s(<q_t, k_s> / sqrt(d))`,
* MRLA-light reads the block's shortcut o, which contains the m of the blocks before:
  `m = g * v + lam * o`, `g = sigmoid(<q, k> / sqrt(d))`.

The form sets the place of the norms. Both forms add the result to x:

* `post` (post-norm), as in the paper's ResNet, for blocks with batch norms: `x + drop_path(norm(m))`. MRLA-base applies
  a ReLU after the norm.
* `pre` (pre-norm), as in the paper's DeiT, for blocks with layer norms: x and o are normed first, then
  `x + drop_path(m)`. MRLA-light applies a GELU to v.

The layout of x and o is NCHW, NHWC or NLC: tokens [B, P + H * W, C]. Prefix tokens are not part of the map. In the form
`pre`, the layer adds norm(prefix) to the prefix, as in the paper's DeiT. In the form `post`, the prefix stays the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from timm_mrla.layers.folding import Affine, fold, is_batch_norm, is_folded
from timm_mrla.layers.layout import LAYOUTS, Grid, from_map, to_map
from timm_mrla.layers.query_key import Gate, Memory, Scores
from timm_mrla.layers.recompute import recompute

FORMS = ('post', 'pre')

Norm = Callable[..., nn.Module]


class _Mrla(nn.Module):
    """Base class of the layer that MRLA adds to a block. A subclass computes m from weights and values."""

    # fast_path(layer, *args of forward) returns forward's result, or None; timm_mrla/ops/__init__.py sets it
    fast_path: Callable[..., Any] | None = None
    num_prefix_tokens: int | None = None  # how many come before the patches, in the layout NLC; None: any number
    grid: Grid = None  # of tokens, where a call gives none; None: each call must give one
    recompute = False  # True: backward computes the branch again instead of saving its tensors

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
            norm_layer: Norm, called with dim. Its input is a map [B, C, H, W] in the form `post`, x in the form `pre`.
            form: 'post' or 'pre'.
            layout: 'NCHW', 'NHWC' or 'NLC'.
            drop_path: Stochastic depth rate of the layer's branch.

        Raises:
            ValueError: dim_head does not divide dim, or form or layout is unknown.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, value, values in (('form', form, FORMS), ('layout', layout, LAYOUTS)):
            if value not in values:
                raise ValueError(f'{name} {value!r} is none of {", ".join(values)}')
        self.form, self.layout = form, layout
        self.attn = self.attn_layer(dim, dim_head, **dd)
        self.v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.norm = norm_layer(dim, **dd) if form == 'post' else nn.Identity()
        self.norm_x = norm_layer(dim, **dd) if form == 'pre' else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.add_parts(dim, norm_layer, **dd)

    def add_parts(self, dim: int, norm_layer: Norm, device=None, dtype=None) -> None:
        """Add the parts that a subclass alone has."""

    def extra_repr(self) -> str:
        """The arguments that `print(model)` shows."""
        return f'form={self.form}, layout={self.layout}, heads={self.attn.num_heads}'

    def output_scales(self) -> list[torch.Tensor]:
        """The tensors that make the layer add exactly zero if they are zero, and that then still get gradients.

        Only those of a frozen batch norm get none: they are buffers.

        Raises:
            ValueError: The norm has no weight that could be zero.
        """
        norm = self.norm if self.form == 'post' else self.norm_x
        frozen = [buffer for name, buffer in norm.named_buffers() if name in ('weight', 'bias')]
        if not (scales := [*norm.parameters(), *frozen]):
            raise ValueError(f'{norm} has no weight that could be zero')
        return scales

    def grid_of(self, x: torch.Tensor, feat_size: Grid) -> Grid:
        """The grid of tokens [B, N, C]; ValueError if they are not the model's prefix tokens and the grid's patches."""
        feat_size = self.grid if feat_size is None else feat_size  # a proxy has no truth value
        if self.num_prefix_tokens is None or feat_size is None or isinstance(x, torch.fx.Proxy):
            return feat_size
        P, (H, W) = self.num_prefix_tokens, feat_size
        if x.shape[1] != P + H * W:
            raise ValueError(
                f'{x.shape[1]} tokens are not {P} prefix tokens and {H} x {W} patches: pass the grid of the patches as '
                'feat_size=(H, W), and add tokens only before them, counted in the num_prefix_tokens that a model has '
                'when it gets layer attention'
            )
        return feat_size

    def join(self, m: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        """Convert m to the layout of x. Prefix tokens become the normed prefix in the form `pre`, zeros in `post`."""
        if prefix is not None and self.form == 'post':
            prefix = torch.zeros_like(prefix)
        return from_map(m, self.layout, prefix)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the batch norm for inference, in place; timm's `reparameterize_model` calls this."""
        if is_batch_norm(self.norm) and self.norm.running_var is not None:
            self.norm, self.drop_path = Affine(*fold(self.norm)), nn.Identity()
        return self


class MrlaLight(_Mrla):
    """MRLA-light, linear in the number of blocks: `x = mrla(x, o)`."""

    attn_layer = Gate

    def add_parts(self, dim: int, norm_layer: Norm, device=None, dtype=None) -> None:
        """Add lam, the norm and activation of the form `pre`, and a place for a norm of the value."""
        is_pre, dd = self.form == 'pre', {'device': device, 'dtype': dtype}
        self.norm_o = norm_layer(dim, **dd) if is_pre else nn.Identity()
        self.norm_v, self.act_v = nn.Identity(), nn.GELU() if is_pre else nn.Identity()
        self.lam = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lam from N(0, 1), as the paper's code does."""
        nn.init.normal_(self.lam)

    def output_scales(self) -> list[torch.Tensor]:
        """As in the base class, plus lam in the form `pre`, because no norm follows lam * o there."""
        return [*super().output_scales(), *([self.lam] if self.form == 'pre' else [])]

    def branch(self, x: torch.Tensor, o: torch.Tensor, feat_size: Grid) -> torch.Tensor:
        """The residual branch before drop_path, of the shape of x."""
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
            o: Output of the block's shortcut, of the same shape as x.
            feat_size: Grid (H, W) of the tokens, for the layout NLC.

        Returns:
            x plus the residual branch.
        """
        args = (x, o, self.grid_of(x, feat_size))
        if self.fast_path and (out := self.fast_path(self, *args)) is not None:
            return out
        return x + self.drop_path(recompute(self, self.branch, *args) if self.recompute else self.branch(*args))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the batch norm for inference, in place: its scale into v and lam."""
        super().fuse()
        is_linear = type(self.norm_v) is type(self.act_v) is nn.Identity and self.v.bias is None
        if is_linear and is_folded(self.norm) and (scale := self.norm.weight) is not None:
            self.norm.weight, self.lam = None, nn.Parameter(self.lam * scale)
            self.v.weight = nn.Parameter(self.v.weight * scale[:, None, None, None])
        return self


class MrlaBase(_Mrla):
    """MRLA-base, quadratic in the number of blocks: `x, memory = mrla(x, memory)`.

    The memory is a tuple (key, value, key, value, ...) of the stage's blocks so far: keys [B, h, d], values
    [B, C, H, W]. Each block returns it for the next; no module stores it. It is empty at the start of a stage.
    """

    attn_layer = Scores

    def branch(self, x: torch.Tensor, feat_size: Grid, *memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The residual branch before drop_path, and the block's key and value."""
        y, prefix = to_map(self.norm_x(x), self.layout, feat_size)
        scores, k = self.attn(y, self.v.out_channels, memory[::2])
        v = self.v(y)
        weights, m = scores.softmax(-1), None
        for s, value in enumerate((*memory[1::2], v)):
            retrieved = self.attn.per_channel(weights[..., s], self.v.out_channels).to(v.dtype) * value
            m = retrieved if m is None else m + retrieved
        m = F.relu(self.norm(m), inplace=True) if self.form == 'post' else m
        return self.join(m, prefix), k, v

    def forward(self, x: torch.Tensor, memory: Memory = (), feat_size: Grid = None) -> tuple[torch.Tensor, Memory]:
        """
        Args:
            x: Output of the block, in the layout.
            memory: Keys and values of the stage's blocks so far.
            feat_size: Grid (H, W) of the tokens, for the layout NLC.

        Returns:
            x plus the residual branch, and the memory for the next block.
        """
        feat_size = self.grid_of(x, feat_size)
        if self.fast_path and (out := self.fast_path(self, x, memory, feat_size)) is not None:
            return out
        args = (x, feat_size, *memory)
        m, k, v = recompute(self, self.branch, *args) if self.recompute else self.branch(*args)
        return x + self.drop_path(m), (*memory, k, v)


def layer_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The layer attention modules of a model, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _Mrla)}
