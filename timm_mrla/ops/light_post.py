"""Kernels of MRLA-light in the form `post`, forward: `x + s * batch_norm(g * v + lam * o)`.

Each kernel computes v, the depthwise convolution of x, again, so neither v nor m = g * v + lam * o is ever stored.
README.md in this folder derives the formulas. Shapes: maps x, o, d (gradient of the output) and dm (of m)
[B, C, H, W] in channels_last; w, the weights of v, [9, C]; g [B, heads]; vectors of channels [C]; s, the drop path
scale of each image, [B].
"""

import torch
import triton
import triton.language as tl

from timm_mrla.ops.common import (
    by_tap,
    cdiv,
    compute_gate,
    is_inside,
    kernel,
    load_channels,
    load_gate,
    load_map,
    positions,
    row_grid,
    split,
    stencil,
    store_map,
    tile_grid,
)
from timm_mrla.ops.operator import operator

# tile sizes: rows, columns, channels, warps; the fastest that we tried on an H100 in bfloat16, at 56 x 56 to 7 x 7
SUMS = {'TH': 2, 'TW': 4, 'BC': 64, 'num_warps': 4}
MAPS = {'TH': 2, 'TW': 4, 'BC': 64, 'num_warps': 4}
APPLY = {'TH': 2, 'TW': 4, 'BC': 128, 'num_warps': 4}
STATISTICS = {'BR': 64, 'BC': 16, 'num_warps': 8}

# entries of `rows` [R, 7, C]: number of positions, sum of x, means of v and o, sums of centered products
COUNT, SUM_X, MEAN_V, MEAN_O, VV, VO, OO = (tl.constexpr(i) for i in range(7))
# rows of `channels` [6, C]: the norm is A * m + BIAS; VAR is the batch's unbiased variance; MRLA-light: LAM = A * lam
A, BIAS, MEAN, RSTD, VAR, LAM = (tl.constexpr(i) for i in range(6))


@kernel
def _sums(x_ptr, o_ptr, w_ptr, rows_ptr, H, W, C, ROWS, TILES, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """Computes rows [B * ROWS, 7, C], sums and means of x, v, o and their products. Reads x and o once.

    Products are of distances to the mean of the first tile, because squares of a large mean would round them away.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    base = (row // ROWS).to(tl.int64) * H * W * C
    x_ptr += base
    o_ptr += base
    first = (row % ROWS) * TILES
    last = min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))
    h, w = positions(first, W, TH, TW)
    inside = is_inside(h, w, H, W)
    count = tl.sum(inside.to(tl.float32), 0)
    v = stencil(x_ptr, w_ptr, h, w, ch, H, W, C)
    shift_v = (tl.sum(tl.where(inside[:, None], v, 0.0), 0) / count)[None, :]
    shift_o = (tl.sum(load_map(o_ptr, h, w, ch, H, W, C), 0) / count)[None, :]
    n = tl.zeros((TH * TW,), tl.float32)
    sx = tl.zeros((TH * TW, BC), tl.float32)
    sv = sx
    so = sx
    svv = sx
    svo = sx
    soo = sx
    for tile in range(first, last):
        h, w = positions(tile, W, TH, TW)
        inside = is_inside(h, w, H, W)
        v = tl.where(inside[:, None], stencil(x_ptr, w_ptr, h, w, ch, H, W, C) - shift_v, 0.0)
        o = tl.where(inside[:, None], load_map(o_ptr, h, w, ch, H, W, C) - shift_o, 0.0)
        n += inside.to(tl.float32)
        sx += load_map(x_ptr, h, w, ch, H, W, C)
        sv += v
        so += o
        svv += v * v
        svo += v * o
        soo += o * o
    count = tl.sum(n, 0)
    mean_v = tl.sum(sv, 0) / count
    mean_o = tl.sum(so, 0) / count
    rows_ptr += row.to(tl.int64) * 7 * C + ch
    mask = ch < C
    tl.store(rows_ptr + COUNT * C, tl.zeros((BC,), tl.float32) + count, mask=mask)
    tl.store(rows_ptr + SUM_X * C, tl.sum(sx, 0), mask=mask)
    tl.store(rows_ptr + MEAN_V * C, tl.sum(shift_v, 0) + mean_v, mask=mask)
    tl.store(rows_ptr + MEAN_O * C, tl.sum(shift_o, 0) + mean_o, mask=mask)
    tl.store(rows_ptr + VV * C, tl.sum(svv, 0) - count * mean_v * mean_v, mask=mask)
    tl.store(rows_ptr + VO * C, tl.sum(svo, 0) - count * mean_v * mean_o, mask=mask)
    tl.store(rows_ptr + OO * C, tl.sum(soo, 0) - count * mean_o * mean_o, mask=mask)


@triton.jit
def entries(ptr, r, ch, K: tl.constexpr, C):
    """Pointers [BR, BC] to the first entry of rows r in [R, K, C]."""
    return ptr + r[:, None].to(tl.int64) * K * C + ch[None, :]


@triton.jit
def entry(at, i: tl.constexpr, ok, C):
    """Load entry i of rows, [BR, BC]."""
    return tl.load(at + i * C, mask=ok, other=0.0)


@triton.jit
def load_gates(g_ptr, r, mask, ch, C, ROWS, heads):
    """Load the gates [BR, BC] of rows r."""
    return tl.load(g_ptr + (r // ROWS)[:, None] * heads + (ch // (C // heads))[None, :], mask=mask, other=0.0)


@triton.jit
def _moments(rows_ptr, g_ptr, lam_ptr, r, ok, ch, C, L, ROWS, PER_ROW, heads):
    """Of rows r: the number of positions, the mean of m, and its squared distances to this mean, [BR, BC]."""
    if lam_ptr is None:
        at = entries(rows_ptr, r, ch, 2, C)
        count = tl.minimum(PER_ROW, L - (r % ROWS) * PER_ROW).to(tl.float32)[:, None]
        return tl.where(ok, count, 0.0), entry(at, 0, ok, C), entry(at, 1, ok, C)
    else:
        at = entries(rows_ptr, r, ch, 7, C)
        g = load_gates(g_ptr, r, ok, ch, C, ROWS, heads)
        lam = load_channels(lam_ptr, ch, C)
        squares = g * g * entry(at, VV, ok, C) + 2 * g * lam * entry(at, VO, ok, C) + lam * lam * entry(at, OO, ok, C)
        return entry(at, COUNT, ok, C), g * entry(at, MEAN_V, ok, C) + lam * entry(at, MEAN_O, ok, C), squares


@kernel
def _statistics(
    rows_ptr,
    g_ptr,
    lam_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    var_ptr,
    channels_ptr,
    R,
    L,
    C,
    ROWS,
    PER_ROW,
    heads,
    eps,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes channels [6, C] of the norm of m, from rows or from running statistics. Reads no map.

    rows [R, 7, C], or in MRLA-base, without lam, [R, 2, C] of PER_ROW of the L positions: mean and squared distances.
    """
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = ch < C
    if mean_ptr is None:
        n = tl.zeros((BR, BC), tl.float32)
        s = n
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            ok = (r < R)[:, None] & mask[None, :]
            count, m, _ = _moments(rows_ptr, g_ptr, lam_ptr, r, ok, ch, C, L, ROWS, PER_ROW, heads)
            n += count
            s += count * m
        total_n = tl.maximum(tl.sum(n, 0), 1.0)
        mean = tl.sum(s, 0) / total_n
        s = tl.zeros((BR, BC), tl.float32)
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            ok = (r < R)[:, None] & mask[None, :]
            count, m, within = _moments(rows_ptr, g_ptr, lam_ptr, r, ok, ch, C, L, ROWS, PER_ROW, heads)
            away = m - mean[None, :]
            s += count * away * away + within
        squares = tl.sum(s, 0)
        var = squares / total_n
        tl.store(channels_ptr + VAR * C + ch, squares / tl.maximum(total_n - 1.0, 1.0), mask=mask)
    else:
        mean = tl.load(mean_ptr + ch, mask=mask, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + ch, mask=mask, other=1.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(var + eps)
    a = rstd
    bias = -mean * rstd
    if gamma_ptr is not None:
        a = rstd * tl.load(gamma_ptr + ch, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(beta_ptr + ch, mask=mask, other=0.0).to(tl.float32) - mean * a
    tl.store(channels_ptr + A * C + ch, a, mask=mask)
    tl.store(channels_ptr + BIAS * C + ch, bias, mask=mask)
    tl.store(channels_ptr + MEAN * C + ch, mean, mask=mask)
    tl.store(channels_ptr + RSTD * C + ch, rstd, mask=mask)
    if lam_ptr is not None:
        tl.store(channels_ptr + LAM * C + ch, a * tl.load(lam_ptr + ch, mask=mask, other=0.0).to(tl.float32), mask=mask)


@kernel
def _apply(
    x_ptr,
    o_ptr,
    w_ptr,
    g_ptr,
    a_ptr,
    lam_ptr,
    bias_ptr,
    s_ptr,
    out_ptr,
    H,
    W,
    C,
    heads,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes x + s * (a * g * v + lam * o + bias). Reads x and o, writes one map. Without a, w contains it."""
    tiles = tl.cdiv(H, TH) * tl.cdiv(W, TW)
    b, ch = tl.program_id(0) // tiles, tl.program_id(1) * BC + tl.arange(0, BC)
    h, w = positions(tl.program_id(0) % tiles, W, TH, TW)
    base = b.to(tl.int64) * H * W * C
    a = load_gate(g_ptr, b, ch, C, heads)
    if a_ptr is not None:
        a *= load_channels(a_ptr, ch, C)
    m = a * stencil(x_ptr + base, w_ptr, h, w, ch, H, W, C)
    m += load_channels(lam_ptr, ch, C) * load_map(o_ptr + base, h, w, ch, H, W, C) + load_channels(bias_ptr, ch, C)
    if s_ptr is not None:
        m *= tl.load(s_ptr + b)
    store_map(out_ptr + base, load_map(x_ptr + base, h, w, ch, H, W, C) + m, h, w, ch, H, W, C)


@kernel
def _mean_sums(x_ptr, rows_ptr, P, C, ROWS, PER_ROW, BP: tl.constexpr, BC: tl.constexpr):
    """Computes rows [B * ROWS, 1, C], sums of x over PER_ROW of the P = H * W positions. Reads x once."""
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    x_ptr += (row // ROWS).to(tl.int64) * P * C
    first = (row % ROWS) * PER_ROW
    last = min(first + PER_ROW, P)
    s = tl.zeros((BP, BC), tl.float32)
    for p0 in range(first, last, BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < last)[:, None] & (ch < C)[None, :]
        s += tl.load(x_ptr + p[:, None] * C + ch[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(rows_ptr + row.to(tl.int64) * C + ch, tl.sum(s, 0), mask=ch < C)


def compute_channels(
    rows: torch.Tensor,
    norm: tuple[torch.Tensor | None, ...],
    sizes: tuple[int | float, ...],
    g: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows A to LAM [6, C] of a norm: weight, bias, running mean and variance. sizes: L to eps of the kernel."""
    (R, _, C), (L, *others) = rows.shape, sizes
    channels = rows.new_empty(6, C)
    _statistics[(cdiv(C, STATISTICS['BC']),)](rows, g, lam, *norm, channels, R, L, C, *others, **STATISTICS)
    return channels


def rows_of(x: torch.Tensor) -> int:
    """Number of rows of each image in the tensor `rows` that `forward` returns."""
    return row_grid(x.shape, **SUMS)[1]


def _run_apply(x, o, w, g, a, lam, bias, s) -> torch.Tensor:
    _, C, H, W = x.shape
    out = torch.empty_like(x)
    _apply[tile_grid(x.shape, **APPLY)](x, o, w, g, a, lam, bias, s, out, H, W, C, g.shape[1], **APPLY)
    return out


@operator('timm_mrla::light_post')
def forward(
    x: torch.Tensor,
    o: torch.Tensor,
    qk: torch.Tensor,
    w: torch.Tensor,
    lam: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    s: torch.Tensor | None,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """MRLA-light of the form `post`, `x + s * batch_norm(g * v + lam * o)`.

    Args:
        x, o: Maps [B, C, H, W] in channels_last.
        qk: Weights [2, 1, 1, K] of the convolutions of query and key.
        w: Weights [C, 1, 3, 3] of the convolution of the value.
        lam, gamma, beta: Vectors [C]; gamma and beta are the affine parameters of the norm, or None.
        mean, var: Running statistics [C]; None to use the statistics of the batch.
        s: Scales [B] of stochastic depth, or None.
        heads, eps: Number of heads; epsilon of the norm.

    Returns:
        The output, and four tensors for backward. The second of them is [6, C]; its rows 2 and 4 are the mean and the
        unbiased variance of the batch.
    """
    (B, C, H, W), w = x.shape, by_tap(w)
    grid, n, tiles = row_grid(x.shape, **SUMS)
    rows = x.new_empty(B, n, 7, C, dtype=torch.float32)
    _sums[grid](x, o, w, rows, H, W, C, n, tiles, **SUMS)
    y, g = compute_gate(rows[:, :, SUM_X.value], qk, heads, H * W)
    channels = compute_channels(rows.view(B * n, 7, C), (gamma, beta, mean, var), (H * W, n, 1, heads, eps), g, lam)
    return _run_apply(x, o, w, g, channels[A.value], channels[LAM.value], channels[BIAS.value], s), rows, channels, y, g


@operator('timm_mrla::light_folded')
def folded(
    x: torch.Tensor,
    o: torch.Tensor,
    qk: torch.Tensor,
    w: torch.Tensor,
    lam: torch.Tensor,
    bias: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """MRLA-light of the form `post` for inference, its norm folded into w, lam and bias [C]."""
    B, C, H, W = x.shape
    BP, BC = 16, 64
    n, tiles = split(cdiv(H * W, BP), B * cdiv(C, BC))
    rows = x.new_empty(B, n, C, dtype=torch.float32)
    _mean_sums[(B * n, cdiv(C, BC))](x, rows, H * W, C, n, tiles * BP, BP=BP, BC=BC)
    _, g = compute_gate(rows, qk, heads, H * W)
    return _run_apply(x, o, by_tap(w), g, None, lam, bias, None)
