"""Kernels of MRLA-light in the form `post`, backward. The docstring of light_post.py lists the shapes."""

import torch
import triton.language as tl

from timm_mrla.ops.common import (
    by_tap,
    cdiv,
    compute_gate_backward,
    kernel,
    load_channels,
    load_gate,
    load_map,
    positions,
    row_grid,
    stencil,
    store_map,
    store_taps,
    tile_grid,
    total,
    transposed_stencil,
)
from timm_mrla.ops.light_post import (
    COUNT,
    MAPS,
    MEAN,
    MEAN_O,
    MEAN_V,
    OO,
    RSTD,
    STATISTICS,
    SUMS,
    VO,
    VV,
    A,
    entries,
    entry,
    load_gates,
)
from timm_mrla.ops.operator import operator


@kernel
def _gradient_sums(
    x_ptr,
    o_ptr,
    d_ptr,
    w_ptr,
    rows_ptr,
    back_ptr,
    H,
    W,
    C,
    ROWS,
    TILES,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes back [B * ROWS, 3, C], sums of d, d * (v - mean_v) and d * (o - mean_o). Reads x, o and d."""
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    base = (row // ROWS).to(tl.int64) * H * W * C
    rows_ptr += row.to(tl.int64) * 7 * C
    mean_v = load_channels(rows_ptr + MEAN_V * C, ch, C)
    mean_o = load_channels(rows_ptr + MEAN_O * C, ch, C)
    first = (row % ROWS) * TILES
    s = tl.zeros((TH * TW, BC), tl.float32)
    sv = s
    so = s
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        d = load_map(d_ptr + base, h, w, ch, H, W, C)
        s += d
        sv += d * (stencil(x_ptr + base, w_ptr, h, w, ch, H, W, C) - mean_v)
        so += d * (load_map(o_ptr + base, h, w, ch, H, W, C) - mean_o)
    back_ptr += row.to(tl.int64) * 3 * C + ch
    tl.store(back_ptr, tl.sum(s, 0), mask=ch < C)
    tl.store(back_ptr + C, tl.sum(sv, 0), mask=ch < C)
    tl.store(back_ptr + 2 * C, tl.sum(so, 0), mask=ch < C)


@kernel
def _gradient_statistics(
    rows_ptr,
    back_ptr,
    g_ptr,
    lam_ptr,
    channels_ptr,
    s_ptr,
    linear_ptr,
    vectors_ptr,
    dg_ptr,
    R,
    C,
    ROWS,
    heads,
    TRAIN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes vectors [3, C], the gradients of gamma, beta and lam, and dg [R, C], of the gates. Reads no map.

    linear [3, C]: dm = s * a * d + linear0 * g * v + linear1 * o + linear2.
    """
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = ch < C
    lam = load_channels(lam_ptr, ch, C)
    a = load_channels(channels_ptr + A * C, ch, C)
    mean = load_channels(channels_ptr + MEAN * C, ch, C)
    rstd = load_channels(channels_ptr + RSTD * C, ch, C)
    n = tl.zeros((BR, BC), tl.float32)
    sd = n
    sm = n
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        ok = (r < R)[:, None] & mask[None, :]
        at, back = entries(rows_ptr, r, ch, 7, C), entries(back_ptr, r, ch, 3, C)
        g = load_gates(g_ptr, r, ok, ch, C, ROWS, heads)
        away = g * entry(at, MEAN_V, ok, C) + lam * entry(at, MEAN_O, ok, C) - mean
        d = entry(back, 0, ok, C)
        dm = g * entry(back, 1, ok, C) + lam * entry(back, 2, ok, C) + away * d
        if s_ptr is not None:
            s = tl.load(s_ptr + r // ROWS, mask=r < R, other=0.0)[:, None]
            d *= s
            dm *= s
        n += entry(at, COUNT, ok, C)
        sd += d
        sm += dm
    dbeta = tl.sum(sd, 0)[None, :]
    dgamma = tl.sum(sm, 0)[None, :] * rstd
    c1 = dbeta * 0.0  # zero with running statistics, because the norm is then linear
    c2 = c1
    if TRAIN:
        total_n = tl.maximum(tl.sum(n, 0), 1.0)[None, :]
        c1 = a * dbeta / total_n
        c2 = a * dgamma * rstd / total_n
    tl.store(vectors_ptr + ch, tl.sum(dgamma, 0), mask=mask)
    tl.store(vectors_ptr + C + ch, tl.sum(dbeta, 0), mask=mask)
    tl.store(linear_ptr + ch, tl.sum(-c2, 0), mask=mask)
    tl.store(linear_ptr + C + ch, tl.sum(-c2 * lam, 0), mask=mask)
    tl.store(linear_ptr + 2 * C + ch, tl.sum(c2 * mean - c1, 0), mask=mask)
    sl = tl.zeros((BR, BC), tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        ok = (r < R)[:, None] & mask[None, :]
        at, back = entries(rows_ptr, r, ch, 7, C), entries(back_ptr, r, ch, 3, C)
        g = load_gates(g_ptr, r, ok, ch, C, ROWS, heads)
        mean_v = entry(at, MEAN_V, ok, C)
        mean_o = entry(at, MEAN_O, ok, C)
        vo = entry(at, VO, ok, C)
        k = a
        if s_ptr is not None:
            k = a * tl.load(s_ptr + r // ROWS, mask=r < R, other=0.0)[:, None]
        # dm: the sum of dm over the row; its products with the row's means of v and o are parts of dg and dlam
        away = g * mean_v + lam * mean_o - mean
        dm = k * entry(back, 0, ok, C) - entry(at, COUNT, ok, C) * (c2 * away + c1)
        dg = k * entry(back, 1, ok, C) + dm * mean_v
        dg -= c2 * (g * entry(at, VV, ok, C) + lam * vo)
        tl.store(dg_ptr + r[:, None].to(tl.int64) * C + ch[None, :], dg, mask=ok)
        dlam = k * entry(back, 2, ok, C) + dm * mean_o
        sl += tl.where(ok, dlam - c2 * (g * vo + lam * entry(at, OO, ok, C)), 0.0)
    tl.store(vectors_ptr + 2 * C + ch, tl.sum(sl, 0), mask=mask)


@kernel
def _gradient_m(
    x_ptr,
    o_ptr,
    d_ptr,
    w_ptr,
    g_ptr,
    a_ptr,
    linear_ptr,
    s_ptr,
    dm_ptr,
    H,
    W,
    C,
    heads,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes dm, the gradient of m. Reads x, o and d, writes one map."""
    tiles = tl.cdiv(H, TH) * tl.cdiv(W, TW)
    b, ch = tl.program_id(0) // tiles, tl.program_id(1) * BC + tl.arange(0, BC)
    h, w = positions(tl.program_id(0) % tiles, W, TH, TW)
    base = b.to(tl.int64) * H * W * C
    k = load_channels(a_ptr, ch, C)
    if s_ptr is not None:
        k *= tl.load(s_ptr + b)
    dm = load_channels(linear_ptr, ch, C) * load_gate(g_ptr, b, ch, C, heads)
    dm *= stencil(x_ptr + base, w_ptr, h, w, ch, H, W, C)
    dm += k * load_map(d_ptr + base, h, w, ch, H, W, C)
    dm += load_channels(linear_ptr + C, ch, C) * load_map(o_ptr + base, h, w, ch, H, W, C)
    store_map(dm_ptr + base, dm + load_channels(linear_ptr + 2 * C, ch, C), h, w, ch, H, W, C)


@kernel
def gradient_maps(
    x_ptr,
    d_ptr,
    dm_ptr,
    w_ptr,
    g_ptr,
    e_ptr,
    lam_ptr,
    dx_ptr,
    do_ptr,
    taps_ptr,
    H,
    W,
    C,
    ROWS,
    TILES,
    heads,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes dx = d + g * (transposed stencil of dm) + e, do = lam * dm. Reads x, d and dm, writes dx and do.

    taps [B * ROWS, 9, C]: the gradients of the weights of v. g_ptr None: g is 1; do_ptr None: writes dx only.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = row // ROWS
    base = b.to(tl.int64) * H * W * C
    g = 1.0
    if g_ptr is not None:
        g = load_gate(g_ptr, b, ch, C, heads)
    e = load_channels(e_ptr + b * C, ch, C)
    first = (row % ROWS) * TILES
    taps = (tl.zeros((TH * TW, BC), tl.float32),) * 9
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        x = load_map(x_ptr + base, h, w, ch, H, W, C)
        u, taps = transposed_stencil(dm_ptr + base, x, taps, w_ptr, h, w, ch, H, W, C)
        if do_ptr is not None:
            do = load_channels(lam_ptr, ch, C) * load_map(dm_ptr + base, h, w, ch, H, W, C)
            store_map(do_ptr + base, do, h, w, ch, H, W, C)
        store_map(dx_ptr + base, load_map(d_ptr + base, h, w, ch, H, W, C) + g * u + e, h, w, ch, H, W, C)
    store_taps(taps_ptr + row.to(tl.int64) * 9 * C, taps, g, ch, C)


@operator('timm_mrla::light_post_backward')
def backward(
    d: torch.Tensor,
    x: torch.Tensor,
    o: torch.Tensor,
    qk: torch.Tensor,
    w: torch.Tensor,
    lam: torch.Tensor,
    s: torch.Tensor | None,
    rows: torch.Tensor,
    channels: torch.Tensor,
    y: torch.Tensor,
    g: torch.Tensor,
    train: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, o, qk and w, and of gamma, beta and lam in one tensor [3, C].

    train: the norm used the statistics of the batch.
    """
    d, w = d.contiguous(memory_format=torch.channels_last), by_tap(w)
    B, C, H, W = x.shape
    grid, n, tiles = row_grid(x.shape, **SUMS)
    R, heads = B * n, g.shape[1]
    back, dg, linear = x.new_empty(4 * R + 3, C, dtype=torch.float32).split([3 * R, R, 3])
    vectors = x.new_empty(3, C, dtype=torch.float32)
    _gradient_sums[grid](x, o, d, w, rows, back, H, W, C, n, tiles, **SUMS)
    _gradient_statistics[(cdiv(C, STATISTICS['BC']),)](
        rows, back, g, lam, channels, s, linear, vectors, dg, R, C, n, heads, TRAIN=train, **STATISTICS
    )
    dqk, e = compute_gate_backward(y, g, dg.view(B, n, C), qk, H * W)
    dm, dx, do = torch.empty_like(x), torch.empty_like(x), torch.empty_like(o)
    _gradient_m[tile_grid(x.shape, **MAPS)](x, o, d, w, g, channels[A.value], linear, s, dm, H, W, C, heads, **MAPS)
    grid, n, tiles = row_grid(x.shape, **MAPS)
    taps = x.new_empty(B * n, 9, C, dtype=torch.float32)
    gradient_maps[grid](x, d, dm, w, g, e, lam, dx, do, taps, H, W, C, n, tiles, heads, **MAPS)
    return dx, do, dqk, total(taps, w.dtype).view(C, 1, 3, 3), vectors
