"""MRLA-light of the form `pre`: `x + s * (g * gelu(v) + lam * p)`, kernels and their launchers.

v is the depthwise convolution of y; y and p are x and o after their layer norms. Neither is ever stored, only mean and
reciprocal deviation of each position are. README.md in this folder derives the formulas. Shapes: x, o, d (the gradient
of the output), u [B, N, C] with N = P + H * W, prefix tokens first; w, the weights of v, [9, C]; g [B, heads];
per-channel vectors [C]; s, the drop path of each image, [B]; stats [B, 2, 2, N], of x and o, mean and reciprocal.

A prefix token gets `x + s * y`. A norm's bias may be missing, the norm of o too, and an RMS norm subtracts no mean.
"""

# ruff: noqa: RUF005  Triton has no unpacking of tuples

import torch
import triton
import triton.language as tl

from timm_mrla.ops.common import (
    compute_gate,
    compute_gate_backward,
    is_inside,
    kernel,
    load_channels,
    load_gate,
    load_map,
    positions,
    split,
    store_map,
    store_taps,
    total,
    transposed_stencil,
)

# rows and columns of a tile, channels, warps; the best of those tried on an H200, at 56 x 56 to 7 x 7
APPLY = {'TH': 2, 'TW': 4, 'BC': 32, 'num_warps': 2}
GRADIENT = {'TH': 2, 'TW': 4, 'BC': 64, 'num_warps': 4}


@triton.jit
def _load_vector(ptr, ch, C, missing):
    """One number for each channel [1, BC] of a vector that may be missing."""
    if ptr is None:
        return tl.zeros_like(ch).to(tl.float32)[None, :] + missing
    else:
        return load_channels(ptr, ch, C)


@triton.jit
def _load_normed(ptr, stats_ptr, weight, bias, h, w, ch, H, W, C, N):
    """Values [positions, BC] of a map after its norm, zero outside."""
    inside = is_inside(h, w, H, W)
    mean = tl.load(stats_ptr + h * W + w, mask=inside, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + N + h * W + w, mask=inside, other=0.0)[:, None]
    x = (load_map(ptr, h, w, ch, H, W, C) - mean) * rstd * weight + bias
    return tl.where(inside[:, None] & (ch < C)[None, :], x, 0.0)


@triton.jit
def _normed_stencil(ptr, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N):
    """The depthwise 3x3 convolution [positions, BC] of a map after its norm."""
    v = _load_normed(ptr, stats_ptr, weight, bias, h - 1, w - 1, ch, H, W, C, N) * load_channels(w_ptr, ch, C)
    for i in tl.static_range(1, 9):
        y = _load_normed(ptr, stats_ptr, weight, bias, h + (i // 3 - 1), w + (i % 3 - 1), ch, H, W, C, N)
        v += y * load_channels(w_ptr + i * C, ch, C)
    return v


@triton.jit
def _gelu(v):
    """gelu(v) and its derivative."""
    cdf = 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))
    return v * cdf, cdf + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@kernel
def _norms(
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
    """Reads x and o once -> stats; rows [B * ROWS, C]: sums of y over the map; writes the prefix of the output."""
    row, which, ch = tl.program_id(0), tl.program_id(1), tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    first = (row % ROWS) * PER_ROW
    last = min(first + PER_ROW, N)
    ptr = x_ptr + b * N * C
    if which == 1:
        ptr = o_ptr + b * N * C
    stats_ptr += (b * 2 + which) * 2 * N
    weight = load_channels(nw_ptr, ch, C)
    bias = _load_vector(nb_ptr, ch, C, 0.0)
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
    """Reads x and o once, writes x + s * (g * gelu(v) + lam * p)."""
    tiles = tl.cdiv(H, TH) * tl.cdiv(W, TW)
    b, ch = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    h, w = positions(tl.program_id(0) % tiles, W, TH, TW)
    N = P + H * W
    base = (b * N + P) * C
    stats_ptr += b * 4 * N + P
    weight, bias = load_channels(nw_ptr, ch, C), _load_vector(nb_ptr, ch, C, 0.0)
    m, _ = _gelu(_normed_stencil(x_ptr + base, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N))
    m *= load_gate(g_ptr, b, ch, C, heads)
    if ow_ptr is None:
        p = load_map(o_ptr + base, h, w, ch, H, W, C)
    else:
        weight, bias = load_channels(ow_ptr, ch, C), _load_vector(ob_ptr, ch, C, 0.0)
        p = _load_normed(o_ptr + base, stats_ptr + 2 * N, weight, bias, h, w, ch, H, W, C, N)
    m += load_channels(lam_ptr, ch, C) * p
    if s_ptr is not None:
        m *= tl.load(s_ptr + b)
    store_map(out_ptr + base, load_map(x_ptr + base, h, w, ch, H, W, C) + m, h, w, ch, H, W, C)


@kernel
def _gradient_v(
    x_ptr,
    d_ptr,
    w_ptr,
    g_ptr,
    nw_ptr,
    nb_ptr,
    s_ptr,
    stats_ptr,
    u_ptr,
    rows_ptr,
    H,
    W,
    P,
    C,
    ROWS,
    TILES,
    heads,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Reads x and d once, writes u = s * g * d * gelu'(v), the gradient of v.

    rows [B * ROWS, C]: sums of s * d * gelu(v), the gradient of the gate.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    N = P + H * W
    base = (b * N + P) * C
    x_ptr += base
    stats_ptr += b * 4 * N + P
    g = load_gate(g_ptr, b, ch, C, heads)
    weight, bias = load_channels(nw_ptr, ch, C), _load_vector(nb_ptr, ch, C, 0.0)
    s = 1.0
    if s_ptr is not None:
        s = tl.load(s_ptr + b)
    first = (row % ROWS) * TILES
    gates = tl.zeros((TH * TW, BC), tl.float32)
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        z, slope = _gelu(_normed_stencil(x_ptr, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N))
        d = s * load_map(d_ptr + base, h, w, ch, H, W, C)
        gates += d * z
        store_map(u_ptr + base, g * d * slope, h, w, ch, H, W, C)
    tl.store(rows_ptr + row.to(tl.int64) * C + ch, tl.sum(gates, 0), mask=ch < C)


@kernel
def _gradient_y(
    x_ptr,
    u_ptr,
    w_ptr,
    e_ptr,
    nw_ptr,
    nb_ptr,
    stats_ptr,
    dy_ptr,
    rows_ptr,
    H,
    W,
    P,
    C,
    ROWS,
    TILES,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Reads x and u once, writes dy = transposed stencil of u + e, of the map alone.

    rows [B * ROWS, 9, C]: the gradients of the weights of v.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    N = P + H * W
    base = (b * N + P) * C
    stats_ptr += b * 4 * N + P
    e = load_channels(e_ptr + b * C, ch, C)
    weight, bias = load_channels(nw_ptr, ch, C), _load_vector(nb_ptr, ch, C, 0.0)
    first = (row % ROWS) * TILES
    taps = (tl.zeros((TH * TW, BC), tl.float32),) * 9
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        y = _load_normed(x_ptr + base, stats_ptr, weight, bias, h, w, ch, H, W, C, N)
        dy, taps = transposed_stencil(u_ptr + base, y, taps, w_ptr, h, w, ch, H, W, C)
        store_map(dy_ptr + base, dy + e, h, w, ch, H, W, C)
    store_taps(rows_ptr + row.to(tl.int64) * 9 * C, taps, 1.0, ch, C)


@triton.jit
def _norm_backward(dz, z, rstd, C, RMS: tl.constexpr):
    """The gradient of what was normed, from that of z, the normed."""
    dz -= z * (tl.sum(dz * z, 1) / C)[:, None]
    if not RMS:
        dz -= (tl.sum(dz, 1) / C)[:, None]
    return rstd * dz


@triton.jit
def _load_row(ptr, stats_ptr, p, at, ok, mask, N):
    """Whole positions [BP, BC] before the affine part of their norm, and its reciprocal deviation [BP, 1]."""
    mean = tl.load(stats_ptr + p, mask=ok, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + N + p, mask=ok, other=0.0)[:, None]
    return tl.where(mask, (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd, 0.0), rstd


@kernel
def _gradient_maps(
    x_ptr,
    o_ptr,
    d_ptr,
    dy_ptr,
    lam_ptr,
    nw_ptr,
    ow_ptr,
    s_ptr,
    stats_ptr,
    dx_ptr,
    do_ptr,
    rows_ptr,
    P,
    N,
    C,
    ROWS,
    PER_ROW,
    RMS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Reads x, o, d and dy once, writes dx and do.

    rows [B * ROWS, 4, C]: sums of dy * z and dy, z the normed x before the affine part; of s * d * z and s * d, z of o.
    """
    row, ch = tl.program_id(0), tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    base = b * N * C
    stats_ptr += b * 4 * N
    first = (row % ROWS) * PER_ROW
    last = min(first + PER_ROW, N)
    s = 1.0
    if s_ptr is not None:
        s = tl.load(s_ptr + b)
    dyz = tl.zeros((BP, BC), tl.float32)
    dys = dyz
    dz_o = dyz
    ds_o = dyz
    for p0 in range(first, last, BP):
        p = p0 + tl.arange(0, BP)
        ok = p < last
        mask = ok[:, None] & (ch < C)[None, :]
        at = p[:, None] * C + ch[None, :]
        is_prefix = (p < P)[:, None]
        d = tl.load(d_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + at, mask=mask & ~is_prefix, other=0.0).to(tl.float32)
        dy = tl.where(is_prefix, s * d, dy)
        z, rstd = _load_row(x_ptr + base, stats_ptr, p, at, ok, mask, N)
        dx = d + _norm_backward(dy * load_channels(nw_ptr, ch, C), z, rstd, C, RMS)
        tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dyz += dy * z
        dys += dy
        d = tl.where(is_prefix, 0.0, s * d)
        do = d * load_channels(lam_ptr, ch, C)
        if ow_ptr is None:
            z = tl.load(o_ptr + base + at, mask=mask, other=0.0).to(tl.float32)
        else:
            z, rstd = _load_row(o_ptr + base, stats_ptr + 2 * N, p, at, ok, mask, N)
            do = _norm_backward(do * load_channels(ow_ptr, ch, C), z, rstd, C, RMS)
        tl.store(do_ptr + base + at, do.to(do_ptr.dtype.element_ty), mask=mask)
        dz_o += d * z
        ds_o += d
    rows_ptr += row.to(tl.int64) * 4 * C + ch
    tl.store(rows_ptr, tl.sum(dyz, 0), mask=ch < C)
    tl.store(rows_ptr + C, tl.sum(dys, 0), mask=ch < C)
    tl.store(rows_ptr + 2 * C, tl.sum(dz_o, 0), mask=ch < C)
    tl.store(rows_ptr + 3 * C, tl.sum(ds_o, 0), mask=ch < C)


@kernel
def _gradient_vectors(rows_ptr, lam_ptr, ow_ptr, ob_ptr, out_ptr, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Sums over rows [R, 4, C] -> the gradients of both norms' weights and biases and of lam, [5, C]."""
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = ch < C
    sums = (tl.zeros((BR, BC), tl.float32),) * 4
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        at = rows_ptr + r[:, None].to(tl.int64) * 4 * C + ch[None, :]
        new = ()
        for i in tl.static_range(4):
            new = new + (sums[i] + tl.load(at + i * C, mask=(r < R)[:, None] & mask[None, :], other=0.0),)
        sums = new
    lam = tl.load(lam_ptr + ch, mask=mask, other=0.0).to(tl.float32)
    dz, ds = tl.sum(sums[2], 0), tl.sum(sums[3], 0)
    dlam = dz
    if ow_ptr is not None:
        dlam = dz * tl.load(ow_ptr + ch, mask=mask, other=0.0).to(tl.float32)
    if ob_ptr is not None:
        dlam += ds * tl.load(ob_ptr + ch, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + ch, tl.sum(sums[0], 0), mask=mask)
    tl.store(out_ptr + C + ch, tl.sum(sums[1], 0), mask=mask)
    tl.store(out_ptr + 2 * C + ch, dz * lam, mask=mask)
    tl.store(out_ptr + 3 * C + ch, ds * lam, mask=mask)
    tl.store(out_ptr + 4 * C + ch, dlam, mask=mask)


def _whole(x: torch.Tensor, elements: int, programs: int = 1) -> tuple[int, int, dict[str, int]]:
    """Rows of each image and positions of a row for a kernel that reads whole positions, and its blocks.

    A block has so many elements, or is one position where that is larger, and a thread has 4 to 16 of them.
    """
    B, N, C = x.shape
    BC = triton.next_power_of_2(C)
    BP = max(1, min(8, elements // BC))
    rows, blocks = split(triton.cdiv(N, BP), B * programs)
    return rows, blocks * BP, {'BP': BP, 'BC': BC, 'num_warps': max(4, BP * BC // 256)}


def forward(
    x: torch.Tensor,
    o: torch.Tensor,
    grid: tuple[int, int],
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
) -> tuple[torch.Tensor, ...]:
    """The output in a dtype, and what backward needs: stats, y, sums of the normed map [B, C], and g."""
    (B, N, C), (H, W) = x.shape, grid
    n, per_row, blocks = _whole(x, 2048, 2)
    out = torch.empty_like(x, dtype=dtype)
    stats, rows = x.new_empty(B, 2, 2, N, dtype=torch.float32), x.new_empty(B, n, C, dtype=torch.float32)
    _norms[(B * n, 1 if ow is None else 2)](
        x, o, nw, nb, s, stats, rows, out, N - H * W, N, C, n, per_row, eps, RMS=rms, **blocks
    )
    y, g = compute_gate(rows, qk, heads, H * W)
    tiles = triton.cdiv(H, APPLY['TH']) * triton.cdiv(W, APPLY['TW'])
    _apply[(B * tiles, triton.cdiv(C, APPLY['BC']))](
        x, o, w, g, lam, nw, nb, ow, ob, s, stats, out, H, W, N - H * W, C, heads, **APPLY
    )
    return out, stats, y, g


def backward(
    d: torch.Tensor,
    x: torch.Tensor,
    o: torch.Tensor,
    grid: tuple[int, int],
    qk: torch.Tensor,
    w: torch.Tensor,
    lam: torch.Tensor,
    nw: torch.Tensor,
    nb: torch.Tensor | None,
    ow: torch.Tensor | None,
    ob: torch.Tensor | None,
    s: torch.Tensor | None,
    stats: torch.Tensor,
    y: torch.Tensor,
    g: torch.Tensor,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, o, qk and w [C, 9], and of nw, nb, ow, ob and lam in one tensor [5, C].

    dtype is that of u and dy.
    """
    (B, N, C), (H, W), heads = x.shape, grid, g.shape[1]
    P = N - H * W
    programs = triton.cdiv(C, GRADIENT['BC'])
    n, tiles = split(triton.cdiv(H, GRADIENT['TH']) * triton.cdiv(W, GRADIENT['TW']), B * programs)
    u, rows = torch.empty_like(x, dtype=dtype), x.new_empty(B, n, C, dtype=torch.float32)
    _gradient_v[(B * n, programs)](x, d, w, g, nw, nb, s, stats, u, rows, H, W, P, C, n, tiles, heads, **GRADIENT)
    dqk, e = compute_gate_backward(y, g, rows, qk, H * W)
    dy, rows = torch.empty_like(u), x.new_empty(B * n, 9, C, dtype=torch.float32)
    _gradient_y[(B * n, programs)](x, u, w, e, nw, nb, stats, dy, rows, H, W, P, C, n, tiles, **GRADIENT)
    dw = total(rows, w.dtype)
    n, per_row, blocks = _whole(x, 1024)
    dx, do = torch.empty_like(x), torch.empty_like(o)
    rows, vectors = (x.new_empty(k, C, dtype=torch.float32) for k in (B * n * 4, 5))
    _gradient_maps[(B * n,)](x, o, d, dy, lam, nw, ow, s, stats, dx, do, rows, P, N, C, n, per_row, RMS=rms, **blocks)
    _gradient_vectors[(triton.cdiv(C, 16),)](rows, lam, ow, ob, vectors, B * n, C, BR=32, BC=16)
    return dx, do, dqk, dw, vectors
