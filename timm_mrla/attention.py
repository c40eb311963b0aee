"""Shows what layer attention does in a model: the weights between its blocks, and the change of their feature maps."""

import inspect
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from timm_mrla.hooks import NOT_RUN, run_with_hooks
from timm_mrla.layers import MrlaBase, layer_attentions, to_map
from timm_mrla.layers.folding import is_folded
from timm_mrla.state_dict import WRAPPERS

__all__ = ['AttentionWeights', 'LayerAttention', 'feature_maps', 'layer_attention', 'output_scales']


class AttentionWeights(dict[str, torch.Tensor]):
    """Weights by stage; `blocks` has the names of the blocks by stage, `heads` the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, list[str]] = {}
        self.heads: dict[str, int] = {}


LayerAttention = AttentionWeights  # its earlier name


def layers_by_block(model: nn.Module) -> dict[str, nn.Module]:
    """The layer attentions of a model, by the names of their blocks; by their own names if a block has several."""
    found = {WRAPPERS.sub('', name): layer for name, layer in layer_attentions(model).items()}
    if any(is_folded(layer.norm) for layer in found.values()):
        raise ValueError('the norms of this model are folded into its weights; look at it before it is reparameterized')
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer attention; timm.list_models('*_mrla*') lists models that have it"
        )
    parents = {name: name.rpartition('.')[0] for name in found}
    count = Counter(filter(None, parents.values()))
    return {parents[name] if count[parents[name]] == 1 else name: m for name, m in found.items()}


def layer_of_block(model: nn.Module, block: str) -> nn.Module:
    """The layer attention of a block; ValueError if there is none."""
    layers = layers_by_block(model)
    if block not in layers:
        raise ValueError(f'there is no layer attention in {block!r}; it is in {", ".join(layers)}')
    return layers[block]


@torch.no_grad()
def output_scales(model: nn.Module) -> dict[str, float]:
    """Tell how much the layer attention of each block can add, to see whether it learns.

    Args:
        model: A model with layer attention.

    Returns:
        By block, the largest absolute value of its output scales: 0 in a warm start that is not trained yet, 1 or more
        with the paper's initialization.

    Raises:
        ValueError: The model has no layer attention or was reparameterized.
    """
    return {
        block: max(scale.abs().max().item() for scale in layer.output_scales())
        for block, layer in layers_by_block(model).items()
    }


def _check_ran(blocks: list[str]) -> None:
    """Raise ValueError if there are blocks whose layer attention did not run."""
    if blocks:
        raise ValueError(f'layer attention did not run in {", ".join(blocks)}: {NOT_RUN}')


def _copy(x: torch.Tensor) -> torch.Tensor:
    """A copy that no later block can change, in float32 or wider."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)


def layer_attention(model: nn.Module, images: torch.Tensor) -> AttentionWeights:
    """Compute how much each block of a stage retrieves from each block before it, and from itself.

    W[t, s] is the weight of the value of block s in the output of layer attention in block t. It is 0 for s > t.

    * In MRLA-base, W is the softmax over s <= t of <q_t, k_s> / sqrt(d), so rows sum to one.
    * In MRLA-light, W follows from the recursion `m_t = g_t * v_t + lam_t * m_{t-1}`: the gate of block s times lam of
      all blocks after it, `W[t, s] = g_s * lam_{s+1} * ... * lam_t`, of either sign. In the models, layer attention
      reads the block's shortcut, which contains more than m_{t-1}; W describes the recursion only.

    With MRLA-base, a stage starts with an empty memory. With MRLA-light, it starts where the parent module or the shape
    of the maps changes. A stage is named after the parent module of its blocks, or after its first block if the parent
    is the model or contains several stages.

    The images pass through the model once, in evaluation mode, because training mode would update running statistics.
    Afterwards all modes are as before.

    Args:
        model: A model with layer attention.
        images: Images [B, C, H, W] or one image [C, H, W], transformed as the model needs them, on any device.

    Returns:
        For each stage of T blocks, W [B, heads, T, T] of MRLA-base or [B, C, T, T] of MRLA-light, float32 or wider.

    Raises:
        ValueError: The model has no layer attention or was reparameterized, some of it did not run, or the images
            have another number of dimensions.
    """
    calls = []

    def record(block: str, mrla: nn.Module) -> Callable[..., None]:
        return lambda attn, args, kwargs, out: calls.append((block, mrla, args[0].shape, out))

    layers = layers_by_block(model)
    idle = run_with_hooks(model, images, {mrla.attn: record(block, mrla) for block, mrla in layers.items()})
    _check_ran([block for block, mrla in layers.items() if mrla.attn in idle])

    stages, last_place = [], None
    for block, mrla, shape, out in calls:
        holder = block.rpartition('.')[0]
        if isinstance(mrla, MrlaBase):
            row = _copy(out[0]).softmax(-1)
            starts = row.shape[-1] == 1
        else:
            row = _copy(mrla.attn.per_channel(out, mrla.v.out_channels).flatten(2))
            starts = last_place != (holder, shape)
            if not starts:
                row = torch.cat([stages[-1]['rows'][-1] * _copy(mrla.lam)[:, None], row], dim=-1)
        last_place = (holder, shape)
        if starts:
            stages.append({'holder': holder, 'heads': mrla.attn.num_heads, 'blocks': [], 'rows': []})
        stages[-1]['blocks'].append(block)
        stages[-1]['rows'].append(row)

    holders = Counter(stage['holder'] for stage in stages)
    attention = AttentionWeights()
    for stage in stages:
        name = stage['holder'] if stage['holder'] and holders[stage['holder']] == 1 else stage['blocks'][0]
        T = len(stage['rows'])
        attention[name] = torch.stack([F.pad(row, (0, T - row.shape[-1])) for row in stage['rows']], dim=-2)
        attention.blocks[name] = stage['blocks']
        attention.heads[name] = stage['heads']
    return attention


def feature_maps(model: nn.Module, images: torch.Tensor, block: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the feature maps of a block before and after layer attention is added.

    The images pass through the model as in `layer_attention`.

    Args:
        model: A model with layer attention.
        images: Images [B, C, H, W] or one image [C, H, W], transformed as the model needs them, on any device.
        block: Name of the block, such as `layer3.5`.

    Returns:
        Both maps [B, C, H, W], float32 or wider. Of tokens, the map of the patches.

    Raises:
        ValueError: As in `layer_attention`, or the block has no layer attention.
    """
    mrla = layer_of_block(model, block)
    maps = []

    def record(mrla: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor | tuple) -> None:
        call = inspect.signature(mrla.forward).bind(*args, **kwargs).arguments
        for x in (call['x'], out[0] if isinstance(out, tuple) else out):
            maps.append(_copy(to_map(x, mrla.layout, call.get('feat_size'))[0]))

    _check_ran([block] if run_with_hooks(model, images, {mrla: record}) else [])
    before, after = maps
    return before, after
