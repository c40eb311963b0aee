"""Kernels of MRLA-light in the form `pre`, backward. The docstring of light_pre.py lists the shapes."""

# ruff: noqa: RUF005  Triton has no unpacking of tuples

import torch
import triton
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
    store_map,
    store_taps,
    total,
    transposed_stencil,
)
from timm_mrla.ops.light_pre import GRADIENT, gelu, load_normed, load_vector, normed_stencil, whole
from timm_mrla.ops.operator import operator


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
    """Computes u = s * g * d * gelu'(v), the gradient of v. Reads x and d, writes one map.

    rows [B * ROWS, C]: sums of s * d * gelu(v), the gradient of the gate.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    N = P + H * W
    base = (b * N + P) * C
    x_ptr += base
    stats_ptr += b * 4 * N + P
    g = load_gate(g_ptr, b, ch, C, heads)
    weight, bias = load_channels(nw_ptr, ch, C), load_vector(nb_ptr, ch, C, 0.0)
    s = 1.0
    if s_ptr is not None:
        s = tl.load(s_ptr + b)
    first = (row % ROWS) * TILES
    gates = tl.zeros((TH * TW, BC), tl.float32)
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        z, slope = gelu(normed_stencil(x_ptr, stats_ptr, w_ptr, weight, bias, h, w, ch, H, W, C, N))
        d = s * load_map(d_ptr + base, h, w, ch, H, W, C)
        gates += d * z
        store_map(u_ptr + base, g * d * slope, h, w, ch, H, W, C)
    tl.store(rows_ptr + row.to(tl.int64) * C + ch, tl.sum(gates, 0), mask=ch < C)


@kernel
def gradient_y(
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
    """Computes dy = (transposed stencil of u) + e, without prefix tokens. Reads x and u, writes one map.

    rows [B * ROWS, 9, C]: the gradients of the weights of v.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    N = P + H * W
    base = (b * N + P) * C
    stats_ptr += b * 4 * N + P
    e = load_channels(e_ptr + b * C, ch, C)
    weight, bias = load_channels(nw_ptr, ch, C), load_vector(nb_ptr, ch, C, 0.0)
    first = (row % ROWS) * TILES
    taps = (tl.zeros((TH * TW, BC), tl.float32),) * 9
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        y = load_normed(x_ptr + base, stats_ptr, weight, bias, h, w, ch, H, W, C, N)
        dy, taps = transposed_stencil(u_ptr + base, y, taps, w_ptr, h, w, ch, H, W, C)
        store_map(dy_ptr + base, dy + e, h, w, ch, H, W, C)
    store_taps(rows_ptr + row.to(tl.int64) * 9 * C, taps, 1.0, ch, C)


@triton.jit
def _norm_backward(dz, z, rstd, C, RMS: tl.constexpr):
    """The gradient of a norm's input from dz, the gradient of its output z before the affine part."""
    dz -= z * (tl.sum(dz * z, 1) / C)[:, None]
    if not RMS:
        dz -= (tl.sum(dz, 1) / C)[:, None]
    return rstd * dz


@triton.jit
def _load_row(ptr, stats_ptr, p, at, ok, mask, N):
    """Load all channels of positions and norm them without affine part, [BP, BC]; also the reciprocal deviation."""
    mean = tl.load(stats_ptr + p, mask=ok, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + N + p, mask=ok, other=0.0)[:, None]
    return tl.where(mask, (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd, 0.0), rstd


@kernel
def gradient_maps(
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
    """Computes dx and do, through both norms. Reads x, o, d and dy, writes dx and do. do_ptr None: no o and no do.

    rows [B * ROWS, 4, C]: sums of dy * z and dy, where z is x normed without affine part; then of s * d * z and s * d,
    where z is o, normed likewise. Without do, rows is [B * ROWS, 2, C].
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
        if do_ptr is not None:
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
    ENTRIES: tl.constexpr = 2 if do_ptr is None else 4
    rows_ptr += row.to(tl.int64) * ENTRIES * C + ch
    tl.store(rows_ptr, tl.sum(dyz, 0), mask=ch < C)
    tl.store(rows_ptr + C, tl.sum(dys, 0), mask=ch < C)
    if do_ptr is not None:
        tl.store(rows_ptr + 2 * C, tl.sum(dz_o, 0), mask=ch < C)
        tl.store(rows_ptr + 3 * C, tl.sum(ds_o, 0), mask=ch < C)


@kernel
def _gradient_vectors(rows_ptr, lam_ptr, ow_ptr, ob_ptr, out_ptr, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Computes the gradients [5, C] of both norms and of lam from rows [R, 4, C]. Reads no map."""
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


@operator('timm_mrla::light_pre_backward')
def backward(
    d: torch.Tensor,
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
    stats: torch.Tensor,
    y: torch.Tensor,
    g: torch.Tensor,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, o, qk and w, and of nw, nb, ow, ob and lam in one tensor [5, C].

    u and dy have the given dtype.
    """
    d, w = d.contiguous(), by_tap(w)
    (B, N, C), (H, W), heads = x.shape, grid, g.shape[1]
    P = N - H * W
    programs, n, tiles = row_grid((B, C, H, W), **GRADIENT)
    u, rows = torch.empty_like(x, dtype=dtype), x.new_empty(B, n, C, dtype=torch.float32)
    _gradient_v[programs](x, d, w, g, nw, nb, s, stats, u, rows, H, W, P, C, n, tiles, heads, **GRADIENT)
    dqk, e = compute_gate_backward(y, g, rows, qk, H * W)
    dy, rows = torch.empty_like(u), x.new_empty(B * n, 9, C, dtype=torch.float32)
    gradient_y[programs](x, u, w, e, nw, nb, stats, dy, rows, H, W, P, C, n, tiles, **GRADIENT)
    dw = total(rows, w.dtype).view(C, 1, 3, 3)
    n, per_row, blocks = whole(x, 1024)
    dx, do = torch.empty_like(x), torch.empty_like(o)
    rows, vectors = (x.new_empty(k, C, dtype=torch.float32) for k in (B * n * 4, 5))
    gradient_maps[(B * n,)](x, o, d, dy, lam, nw, ow, s, stats, dx, do, rows, P, N, C, n, per_row, RMS=rms, **blocks)
    _gradient_vectors[(cdiv(C, 16),)](rows, lam, ow, ob, vectors, B * n, C, BR=32, BC=16)
    return dx, do, dqk, dw, vectors
