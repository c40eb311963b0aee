"""Kernels of MRLA-light in the form `pre`, forward: `x + s * (g * gelu(v) + lam * p)`, for prefix tokens `x + s * y`.

v is the depthwise convolution of y; y and p are x and o after their layer norms. The kernels store none of them, only
the mean and the reciprocal deviation of each position. README.md in this folder derives the formulas. Shapes: x, o, d
(gradient of the output) and u (of v) [B, N, C] with N = P + H * W, prefix tokens first; w, the weights of v, [9, C];
g [B, heads]; vectors of channels [C]; s, the drop path scale of each image, [B]; stats [B, 2, 2, N]: of x and of o,
mean and reciprocal deviation. A bias or the norm of o may be missing (None). An RMS norm subtracts no mean.
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
    power_of_2,
    split,
    store_map,
    tile_grid,
)
from timm_mrla.ops.operator import operator

# tile sizes: rows, columns, channels, warps; the fastest that we tried on an H200, at 56 x 56 to 7 x 7
APPLY = {'TH': 2, 'TW': 4, 'BC': 32, 'num_warps': 2}
GRADIENT = {'TH': 2, 'TW': 4, 'BC': 64, 'num_warps': 4}


@triton.jit
def load_vector(ptr, ch, C, missing):
    """Load a vector of channels as [1, BC]; if ptr is None, fill it with `missing`."""
    if ptr is None:
        return tl.zeros_like(ch).to(tl.float32)[None, :] + missing
    else:
        return load_channels(ptr, ch, C)


@triton.jit
def load_normed(ptr, stats_ptr, weight, bias, h, w, ch, H, W, C, N):
    """Load the values [positions, BC] of a map and norm them; zero outside of the map."""
    inside = is_inside(h, w, H, W)
    mean = tl.load(stats_ptr + h * W + w, mask=inside, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + N + h * W + w, mask=inside, other=0.0)[:, None]
    x = (load_map(ptr, h, w, ch, H, W, C) - mean) * rstd * weight + bias
    return tl.where(inside[:, None] & (ch < C)[None, :], x, 0.0)


@triton.jit
def normed_stencil(ptr, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N):
    """The depthwise 3x3 convolution [positions, BC] of a map after its norm; weights [9, C]."""
    v = load_normed(ptr, stats_ptr, weight, bias, h - 1, w - 1, ch, H, W, C, N) * load_channels(w_ptr, ch, C)
    for i in tl.static_range(1, 9):
        y = load_normed(ptr, stats_ptr, weight, bias, h + (i // 3 - 1), w + (i % 3 - 1), ch, H, W, C, N)
        v += y * load_channels(w_ptr + i * C, ch, C)
    return v


@triton.jit
def gelu(v):
    """gelu(v) and its derivative."""
    cdf = 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))
    return v * cdf, cdf + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@kernel
def norms(
    x_ptr,
    o_ptr,
    nw_ptr,
    nb_ptr,
    s_ptr,
    stats_ptr,
    rows_ptr,
    out_ptr,
    P,
    N,
    C,
    ROWS,
    PER_ROW,
    eps,
    RMS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes stats, rows [B * ROWS, C] (sums of y over the map) and out's prefix. Reads x and, if normed, o."""
    row, which, ch = tl.program_id(0), tl.program_id(1), tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    first = (row % ROWS) * PER_ROW
    last = min(first + PER_ROW, N)
    ptr = x_ptr + b * N * C
    if which == 1:
        ptr = o_ptr + b * N * C
    stats_ptr += (b * 2 + which) * 2 * N
    weight = load_channels(nw_ptr, ch, C)
    bias = load_vector(nb_ptr, ch, C, 0.0)
    sums = tl.zeros((BP, BC), tl.float32)
    for p0 in range(first, last, BP):
        p = p0 + tl.arange(0, BP)
        mask = (p < last)[:, None] & (ch < C)[None, :]
        at = p[:, None] * C + ch[None, :]
        x = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.zeros((BP,), tl.float32)
        if not RMS:
            mean = tl.sum(x, 1) / C
        z = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(z * z, 1) / C + eps)
        tl.store(stats_ptr + p, mean, mask=p < last)
        tl.store(stats_ptr + N + p, rstd, mask=p < last)
        if which == 0:
            y = z * rstd[:, None] * weight + bias
            sums += tl.where(mask & (p >= P)[:, None], y, 0.0)
            if s_ptr is not None:
                y *= tl.load(s_ptr + b)
            tl.store(out_ptr + b * N * C + at, (x + y).to(out_ptr.dtype.element_ty), mask=mask & (p < P)[:, None])
    if which == 0:
        tl.store(rows_ptr + row.to(tl.int64) * C + ch, tl.sum(sums, 0), mask=ch < C)


@kernel
def _apply(
    x_ptr,
    o_ptr,
    w_ptr,
    g_ptr,
    lam_ptr,
    nw_ptr,
    nb_ptr,
    ow_ptr,
    ob_ptr,
    s_ptr,
    stats_ptr,
    out_ptr,
    H,
    W,
    P,
    C,
    heads,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes x + s * (g * gelu(v) + lam * p). Reads x and o, writes one map."""
    tiles = tl.cdiv(H, TH) * tl.cdiv(W, TW)
    b, ch = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    h, w = positions(tl.program_id(0) % tiles, W, TH, TW)
    N = P + H * W
    base = (b * N + P) * C
    stats_ptr += b * 4 * N + P
    weight, bias = load_channels(nw_ptr, ch, C), load_vector(nb_ptr, ch, C, 0.0)
    m, _ = gelu(normed_stencil(x_ptr + base, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N))
    m *= load_gate(g_ptr, b, ch, C, heads)
    if ow_ptr is None:
        p = load_map(o_ptr + base, h, w, ch, H, W, C)
    else:
        weight, bias = load_channels(ow_ptr, ch, C), load_vector(ob_ptr, ch, C, 0.0)
        p = load_normed(o_ptr + base, stats_ptr + 2 * N, weight, bias, h, w, ch, H, W, C, N)
    m += load_channels(lam_ptr, ch, C) * p
    if s_ptr is not None:
        m *= tl.load(s_ptr + b)
    store_map(out_ptr + base, load_map(x_ptr + base, h, w, ch, H, W, C) + m, h, w, ch, H, W, C)


def whole(x: torch.Tensor, elements: int, programs: int = 1) -> tuple[int, int, dict[str, int]]:
    """For a kernel that reads all channels of a position: rows of each image, positions of a row, and block sizes.

    A block has at most 8 positions and `elements` elements, but at least one position. A thread has at most 8 elements.
    """
    B, N, C = x.shape
    BC = power_of_2(C)
    BP = max(1, min(8, elements // BC))
    rows, blocks = split(cdiv(N, BP), B * programs)
    return rows, blocks * BP, {'BP': BP, 'BC': BC, 'num_warps': max(4, BP * BC // 256)}


@operator('timm_mrla::light_pre')
def forward(
    x: torch.Tensor,
    o: torch.Tensor,
    grid: list[int],
    qk: torch.Tensor,
    w: torch.Tensor,
    lam: torch.Tensor,
    nw: torch.Tensor,
    nb: torch.Tensor | None,
    ow: torch.Tensor | None,
    ob: torch.Tensor | None,
    s: torch.Tensor | None,
    heads: int,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """MRLA-light of the form `pre`, `x + s * (g * gelu(v) + lam * p)`, where y and p are x and o after their norms.

    Args:
        x, o: Tokens [B, P + H * W, C].
        grid: H and W.
        qk, w, lam, s, heads: As in `light_post`.
        nw, nb, ow, ob: Weights and biases [C] of the norms of x and o; None for a missing bias or a missing norm of o.
        eps, rms: Epsilon of the norms; whether they are RMS norms rather than layer norms.
        dtype, gradient_dtype: Dtypes of the output and of the intermediate maps in backward.

    Returns:
        The output, and three tensors for backward.
    """
    (B, N, C), (H, W) = x.shape, grid
    n, per_row, blocks = whole(x, 2048, 2)
    out = torch.empty_like(x, dtype=dtype)
    stats, rows = x.new_empty(B, 2, 2, N, dtype=torch.float32), x.new_empty(B, n, C, dtype=torch.float32)
    norms[(B * n, 1 if ow is None else 2)](
        x, o, nw, nb, s, stats, rows, out, N - H * W, N, C, n, per_row, eps, RMS=rms, **blocks
    )
    y, g = compute_gate(rows, qk, heads, H * W)
    _apply[tile_grid((B, C, H, W), **APPLY)](
        x, o, by_tap(w), g, lam, nw, nb, ow, ob, s, stats, out, H, W, N - H * W, C, heads, **APPLY
    )
    return out, stats, y, g
