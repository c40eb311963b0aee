"""Kernels of MRLA-base, forward: `x + s * relu(batch_norm(m))` in the form `post`, `x + s * m` in the form `pre`.

m = sum_t a_t * v_t over the T blocks of the stage up to this one. The values v_t are saved, because later blocks read
them; m is not. README.md in this folder derives the formulas. Shapes: x, d (gradient of the output) [B, N, C] with
N = P + L, prefix tokens first, L = H * W; values v and m [B, L, C]; keys [B, C]; w, the weights of v, [9, C]; a
[B, heads, T]; vectors of channels [C]; s, the drop path scale of each image, [B]; table [2, STRIDE], the addresses of
values and keys.
"""

import torch
import triton.language as tl

from timm_mrla.ops.base_memory import address, addresses, aligned, block, compute_value, grid_of, load, retrieve
from timm_mrla.ops.common import (
    by_tap,
    cdiv,
    head_blocks,
    image_sums,
    kernel,
    load_channels,
    power_of_2,
    query_key,
    split,
)
from timm_mrla.ops.light_post import BIAS, A, compute_channels
from timm_mrla.ops.light_pre import norms, whole
from timm_mrla.ops.operator import operator

# tile sizes: positions, channels, warps
BLOCK = {'BP': 32, 'BC': 64, 'num_warps': 4}
SUMS = {'BP': 64, 'BC': 64, 'num_warps': 8}


@kernel
def _attend(
    rows_ptr,
    y_ptr,
    qk_ptr,
    table_ptr,
    k_ptr,
    scores_ptr,
    a_ptr,
    C,
    ROWS,
    K,
    T,
    STRIDE,
    heads,
    inverse,
    scale,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HB: tl.constexpr,
    D: tl.constexpr,
):
    """Computes for each image y [C], the sum of rows [ROWS, C], k [C], and a [heads, T] = softmax_t(<q, k_t> * scale).

    Reads no map, but all keys. inverse is 1 / L; scores [heads, T] is scratch.
    """
    b = tl.program_id(0).to(tl.int64)
    y_ptr += b * C
    image_sums(rows_ptr + b * ROWS * C, y_ptr, C, ROWS, C, BR, BC)
    d = C // heads
    i = tl.arange(0, D)
    for h0 in range(0, heads, HB):
        head = h0 + tl.arange(0, HB)
        at = (b * heads + head) * T
        c = head[:, None] * d + i[None, :]
        ok = (head < heads)[:, None] & (i < d)[None, :]
        q, k = query_key(y_ptr, qk_ptr, c, ok, C, K, inverse)
        tl.store(k_ptr + b * C + c, k, mask=ok)
        q *= scale
        top = tl.sum(q * k, 1)
        tl.store(scores_ptr + at + T - 1, top, mask=head < heads)
        for t in range(T - 1):
            score = tl.sum(q * load(address(table_ptr + STRIDE, t, k_ptr) + b * C, c, ok), 1)
            tl.store(scores_ptr + at + t, score, mask=head < heads)
            top = tl.maximum(top, score)
        tl.debug_barrier()  # below, threads read scores that other threads of this program wrote
        norm = tl.zeros((HB,), tl.float32)
        for t in range(T):
            norm += tl.exp(tl.load(scores_ptr + at + t, mask=head < heads, other=0.0) - top)
        for t in range(T):
            score = tl.load(scores_ptr + at + t, mask=head < heads, other=0.0)
            tl.store(a_ptr + at + t, tl.exp(score - top) / norm, mask=head < heads)


@kernel
def _retrieved(table_ptr, a_ptr, m_ptr, rows_ptr, L, C, ROWS, PER_ROW, T, heads, BP: tl.constexpr, BC: tl.constexpr):
    """Computes m, and in rows [B * ROWS, 2, C] its means and squared distances to them. Reads T maps, writes one."""
    row = tl.program_id(0)
    blocks = tl.cdiv(L, BP)
    first = (row % ROWS) * PER_ROW
    ch = tl.program_id(1) * BC + tl.arange(0, BC)
    n = 0.0
    mean = tl.zeros((1, BC), tl.float32)
    squares = mean
    for i in range(first, min(first + PER_ROW, blocks)):
        b, at, mask, _ = block((row // ROWS) * blocks + i, blocks, L, C, BP, BC)
        m = retrieve(table_ptr, a_ptr, m_ptr, b, at, mask, ch, L, C, T, heads)
        tl.store(m_ptr + b * L * C + at, m.to(m_ptr.dtype.element_ty), mask=mask)
        count = tl.minimum(L - i * BP, BP).to(tl.float32)
        new = tl.sum(m, 0)[None, :] / count
        away = tl.where(mask, m - new, 0.0)
        squares += tl.sum(away * away, 0)[None, :] + (new - mean) * (new - mean) * (n * count / (n + count))
        mean += (new - mean) * (count / (n + count))
        n += count
    at = rows_ptr + row.to(tl.int64) * 2 * C + ch
    tl.store(at, tl.sum(mean, 0), mask=ch < C)
    tl.store(at + C, tl.sum(squares, 0), mask=ch < C)


@kernel
def _apply(
    x_ptr,
    table_ptr,
    a_ptr,
    v_ptr,
    m_ptr,
    scale_ptr,
    bias_ptr,
    s_ptr,
    out_ptr,
    P,
    L,
    C,
    T,
    heads,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes x + s * relu(scale * m + bias), without scale x + s * m. Reads x and m or T values, writes one map."""
    b, at, mask, ch = block(tl.program_id(0), tl.cdiv(L, BP), L, C, BP, BC)
    if m_ptr is None:
        m = retrieve(table_ptr, a_ptr, v_ptr, b, at, mask, ch, L, C, T, heads)
    else:
        m = load(m_ptr + b * L * C, at, mask)
    if scale_ptr is not None:
        m = m.to(v_ptr.dtype.element_ty).to(tl.float32)  # as in backward, or the ReLU's mask could differ
        m = load_channels(scale_ptr, ch, C) * m + load_channels(bias_ptr, ch, C)
        m = tl.where(m < 0, 0.0, m)
    if s_ptr is not None:
        m *= tl.load(s_ptr + b)
    base = (b * (P + L) + P) * C
    tl.store(out_ptr + base + at, (load(x_ptr + base, at, mask) + m).to(out_ptr.dtype.element_ty), mask=mask)


def _attention(
    rows: torch.Tensor,
    v: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    qk: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, ...]:
    """The key k [B, C], y [B, C] (the sums of rows [B, n, C]), a [B, heads, T], and the table of addresses."""
    B, n, C = rows.shape
    T, L = len(values) + 1, v.shape[2] * v.shape[3]
    k, y = (rows.new_empty(B, C) for _ in range(2))
    table = addresses([*keys, k], [*values, v])
    scores, a = (rows.new_empty(B, heads, T) for _ in range(2))
    sizes, scale, blocks = (C, n, qk.shape[-1], T, T, heads), (C // heads) ** -0.5, head_blocks(C, heads)
    _attend[(B,)](rows, y, qk, table, k, scores, a, *sizes, 1 / L, scale, BR=min(power_of_2(n), 16), **blocks)
    return k, y, a, table


def _run_apply(x, table, a, v, m, scale, bias, s, out) -> None:
    (B, N, C), (_, heads, T), L = x.shape, a.shape, v.shape[2] * v.shape[3]
    _apply[grid_of(B, L, C, **BLOCK)](x, table, a, v, m, scale, bias, s, out, N - L, L, C, T, heads, **BLOCK)


@operator('timm_mrla::base')
def forward(
    x: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    grid: list[int],
    qk: torch.Tensor,
    w: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    s: torch.Tensor | None,
    heads: int,
    eps: float,
    post: bool,
    rms: bool,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """MRLA-base, `x + s * relu(batch_norm(m))` if post, else `x + s * m`, `m = sum_t a_t * v_t`.

    Args:
        x: Maps or tokens [B, P + H * W, C].
        keys, values: Keys [B, C] in float32 and values [B, C, H, W] in channels_last of earlier blocks.
        grid: H and W.
        qk: Weights [2, 1, 1, K] of the convolutions of query and key.
        w: Weights [C, 1, 3, 3] of the convolution of the value.
        weight, bias: Affine parameters [C] of the norm, which is of m if post, else of x; each may be None.
        mean, var: Running statistics [C] of the norm of m; None to use the statistics of the batch.
        s: Scales [B] of stochastic depth, or None.
        heads, eps, rms: Number of heads; epsilon of the norm; whether the norm of x is an RMS norm.
        dtype, value_dtype: Dtypes of the output and of the value.

    Returns:
        The output, the key and the value of this block, and three tensors for backward. If post, the last one is
        [6, C]; its rows 2 and 4 are the mean and the unbiased variance of the batch.
    """
    keys, values, w = aligned(keys), aligned(values), by_tap(w)
    (B, N, C), L = x.shape, grid[0] * grid[1]
    out = torch.empty_like(x, dtype=dtype)
    if not post:
        n, per_row, blocks = whole(x, 2048)
        stats, rows = x.new_empty(B, 2, 2, N, dtype=torch.float32), x.new_empty(B, n, C, dtype=torch.float32)
        norms[(B * n, 1)](x, x, weight, bias, s, stats, rows, out, N - L, N, C, n, per_row, eps, RMS=rms, **blocks)
        v, _ = compute_value(x, grid, w, value_dtype, (weight, bias, stats))
        k, y, a, table = _attention(rows, v, keys, values, qk, heads)
        _run_apply(x, table, a, v, None, None, None, s, out)
        return out, k, v, y, a, stats

    v, rows = compute_value(x, grid, w, value_dtype, sums=True)
    k, y, a, table = _attention(rows, v, keys, values, qk, heads)
    m, n, per_row = None, 1, 1
    programs = cdiv(C, BLOCK['BC'])
    if mean is None:
        m = torch.empty_like(v)
        n, per_row = split(cdiv(L, BLOCK['BP']), B * programs)
        rows = x.new_empty(B * n, 2, C, dtype=torch.float32)
        _retrieved[(B * n, programs)](table, a, m, rows, L, C, n, per_row, a.shape[2], heads, **BLOCK)
    channels = compute_channels(rows, (weight, bias, mean, var), (L, n, per_row * BLOCK['BP'], heads, eps))
    _run_apply(x, table, a, v, m, channels[A.value], channels[BIAS.value], s, out)
    return out, k, v, y, a, channels


@operator('timm_mrla::base_folded')
def folded(
    x: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    grid: list[int],
    qk: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MRLA-base of the form `post` for inference, its norm as scale and bias [C]: output, key and value."""
    keys, values, w = aligned(keys), aligned(values), by_tap(w)
    out = torch.empty_like(x)
    v, rows = compute_value(x, grid, w, x.dtype, sums=True)
    k, _, a, table = _attention(rows, v, keys, values, qk, heads)
    _run_apply(x, table, a, v, None, scale, bias, None, out)
    return out, k, v
