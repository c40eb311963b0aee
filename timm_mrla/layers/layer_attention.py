"""Multi-head recurrent layer attention (MRLA), on feature maps.

Paper: `Cross-Layer Retrospective Retrieving via Layer Attention` - https://arxiv.org/abs/2302.03985

A block t of a stage returns x, a map [B, C, H, W]. From it come, with d channels per head and h = C / d heads,

* the query q and the key k [B, h, d]: the channel means of x through a 1-d convolution over the channels each,
* the value v [B, C, H, W]: x through a 3x3 depthwise convolution,

and the block's output becomes `x + drop_path(act(norm(m)))`, where m is what the block retrieves:

* MRLA-base attends to all blocks s <= t of the stage: `m = sum_s a_s * v_s`, `a = softmax_s(<q_t, k_s> / sqrt(d))`,
* MRLA-light recurs on the block's shortcut o, which holds what the blocks before it retrieved:
  `m = g * act_v(norm_v(v)) + lam * o`, `g = sigmoid(<q, k> / sqrt(d))`.

Every layer attention has one contract, `x, memory = mrla(x, o, memory)`. The memory is the list of the keys and values
of the stage so far, empty at its start. It is passed from block to block and stored nowhere.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_mrla.layers.recompute import recompute

__all__ = ['BaseWeights', 'LightWeights', 'Memory', 'MrlaBase', 'MrlaLight', 'layer_attentions']

Memory = list[tuple[torch.Tensor, torch.Tensor]]


class _QueryKey(nn.Module):
    """Query and key of a feature map."""

    def __init__(self, dim: int, dim_head: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim_head < 1 or dim % dim_head:
            raise ValueError(f'dim {dim} is not divisible by dim_head {dim_head}')
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        t = int(abs((math.log2(dim) + 1) / 2))  # the kernel size that ECA-Net (arXiv:1910.03151) derives from the width
        kernel_size = t if t % 2 else t + 1
        self.q = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.k = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)

    def query_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, heads, dim_head] of a map [B, C, H, W]."""
        # the gradient of a sum is a view, where that of a mean is a map; float16 cannot hold the sum of a large map
        y = x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)) / (x.shape[2] * x.shape[3])
        # one convolution over an image of height B: a batch of tiny 1-d convolutions takes several times as long
        kernels = torch.stack([self.q.weight, self.k.weight])
        q, k = F.conv2d(y.to(x.dtype)[None, None], kernels, padding=(0, kernels.shape[-1] // 2))[0]
        shape = (x.shape[0], -1, self.dim_head)
        return q.reshape(shape), k.reshape(shape)


class LightWeights(_QueryKey):
    """The gate of MRLA-light: `sigmoid(<q, k> / sqrt(d))`, map [B, C, H, W] -> [B, heads]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.query_key(x)
        return ((q * k).sum(-1) * self.scale).sigmoid()


class BaseWeights(_QueryKey):
    """The attention of MRLA-base: `softmax_s(<q_t, k_s> / sqrt(d))` over the blocks s <= t of the stage.

    Map [B, C, H, W] and the keys of the blocks s < t -> weights [B, heads, t + 1] and the key of block t.
    """

    def forward(self, x: torch.Tensor, keys: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.query_key(x)
        scores = torch.stack([(q * key).sum(-1) for key in [*keys, k]], dim=-1)
        return (scores * self.scale).softmax(-1), k


class _LayerAttention(nn.Module):
    """What MRLA adds to a block. A subclass says how weights and values make m, in `retrieve`."""

    recompute = False  # what backward needs of the branch, rather than save it

    def __init__(
        self,
        dim: int,
        dim_head: int,
        norm_layer: type[nn.Module] | None = None,
        act_layer: type[nn.Module] | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            dim: Number of channels, C.
            dim_head: Channels per head, d; divides dim, or ValueError is raised.
            norm_layer: Norm of what is retrieved.
            act_layer: Activation after that norm.
            drop_path: Stochastic depth rate of what is added to the block.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.attn = self.weights_layer(dim, dim_head, **dd)
        self.v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.norm = norm_layer(dim, **dd) if norm_layer else nn.Identity()
        self.act = act_layer() if act_layer else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.scale = self.bias = None  # of a folded norm

    def gates(self) -> list[nn.Parameter]:
        """The parameters that, at zero, make it add exactly nothing while a gradient still reaches them."""
        return list(self.norm.parameters())

    def per_channel(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, heads] -> [B, C, 1, 1]"""
        return weights.unsqueeze(-1).expand(-1, -1, self.attn.dim_head).flatten(1)[:, :, None, None]

    def add_bias(self, m: torch.Tensor) -> torch.Tensor:
        """m with the bias of a folded norm."""
        return m if self.bias is None else m.add_(self.bias.to(m.dtype)[:, None, None])

    def branch(self, x: torch.Tensor, o: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """What is added to x, but for drop_path, and the memory for the next block."""
        m, memory = self.retrieve(x, o, memory)
        return self.act(self.norm(m)), memory

    def add_branch(self, x: torch.Tensor, *args) -> tuple[torch.Tensor, Memory]:
        """x with the branch added to it, and the memory for the next block."""
        m, memory = recompute(self, self.branch, x, *args) if self.recompute else self.branch(x, *args)
        return x + self.drop_path(m), memory

    def forward(self, x: torch.Tensor, o: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """
        Args:
            x: Output of the block, [B, C, H, W].
            o: Input of the block as its shortcut delivers it, [B, C, H, W].
            memory: Keys and values of the stage's blocks so far.

        Returns:
            x with what was retrieved added to it, and the memory for the next block.
        """
        return self.add_branch(x, o, memory)


def _fold(norm: nn.Module) -> tuple[torch.Tensor, nn.Parameter]:
    """Scale and bias [C] of a batch norm in evaluation mode."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, nn.Parameter(norm.bias - norm.running_mean * scale)


def _is_linear(norm: nn.Module) -> bool:
    """Whether a norm is, in evaluation mode, a scale and a bias for each channel."""
    return isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(norm, 'act', nn.Identity()), nn.Identity)


class MrlaLight(_LayerAttention):
    """MRLA-light: `m = g * act_v(norm_v(v)) + lam * o`, linear in the number of blocks. Leaves the memory as it is."""

    weights_layer = LightWeights

    def __init__(
        self,
        dim: int,
        dim_head: int,
        norm_v: type[nn.Module] | None = None,
        act_v: type[nn.Module] | None = None,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        """
        Args:
            dim: Number of channels, C.
            dim_head: Channels per head, d; divides dim, or ValueError is raised.
            norm_v: Norm of the value.
            act_v: Activation of the value, after its norm.
            **kwargs: norm_layer, act_layer and drop_path, as in MRLA-base.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, dim_head, **kwargs, **dd)
        self.norm_v = norm_v(dim, **dd) if norm_v else nn.Identity()
        self.act_v = act_v() if act_v else nn.Identity()
        self.lam = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lam from N(0, 1), as the paper's code does."""
        nn.init.normal_(self.lam)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold batch norms into v, lam and one bias, for inference; timm's `reparameterize_model` calls this."""
        if _is_linear(self.norm_v):
            self.v, self.norm_v = fuse_conv_bn_eval(self.v.eval(), self.norm_v.eval()), nn.Identity()
        if _is_linear(self.norm) and isinstance(self.act_v, nn.Identity):
            scale, self.bias = _fold(self.norm)
            self.norm = nn.Identity()
            self.lam *= scale
            self.v.weight *= scale[:, None, None, None]
            if self.v.bias is not None:
                self.v.bias *= scale

    def retrieve(self, x: torch.Tensor, o: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """m [B, C, H, W] of the block that returned x, and the memory."""
        v = self.act_v(self.norm_v(self.v(x)))
        m = self.per_channel(self.attn(x)).to(v.dtype) * v
        # FX drops an in-place operation whose result is not read
        m = m.addcmul_(self.lam.to(v.dtype)[:, None, None], o)
        return self.add_bias(m), memory


class MrlaBase(_LayerAttention):
    """MRLA-base: `m = sum_s a_s * v_s` over the blocks of the stage so far, quadratic in the number of blocks."""

    weights_layer = BaseWeights

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold a batch norm into the weights and one bias, for inference; timm's `reparameterize_model` calls this."""
        if _is_linear(self.norm):
            scale, self.bias = _fold(self.norm)
            self.scale = nn.Parameter(scale)
            self.norm = nn.Identity()

    def per_channel(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, heads] -> [B, C, 1, 1]"""
        weights = super().per_channel(weights)
        return weights if self.scale is None else weights * self.scale.to(weights.dtype)[:, None, None]

    def add_branch(self, x: torch.Tensor, o: torch.Tensor, *args) -> tuple[torch.Tensor, Memory]:
        """As in MRLA-light, without o: it is not read, and not to be saved for a recomputation."""
        return super().add_branch(x, None, *args)

    def retrieve(self, x: torch.Tensor, o: None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """m [B, C, H, W] of the block that returned x, and the memory with its key and value."""
        weights, k = self.attn(x, [key for key, _ in memory])
        memory = [*memory, (k, self.v(x))]
        m = None
        for s, (_, v) in enumerate(memory):
            weight = self.per_channel(weights[..., s]).to(v.dtype)
            m = weight * v if m is None else m.addcmul_(weight, v)
        return self.add_bias(m), memory


def layer_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The layer attentions of a model, on maps and on tokens, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LayerAttention)}
