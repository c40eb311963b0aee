"""Kernels of MRLA-base, backward. The docstring of base.py lists the shapes."""

import torch
import triton
import triton.language as tl

from timm_mrla.ops.base import BLOCK, SUMS
from timm_mrla.ops.base_memory import (
    VALUE,
    address,
    addresses,
    aligned,
    block,
    compute_value,
    grid_of,
    load,
    load_weight,
    retrieve,
)
from timm_mrla.ops.common import (
    by_tap,
    cdiv,
    head_blocks,
    kernel,
    load_channels,
    query_key,
    query_key_backward,
    row_grid,
    total,
)
from timm_mrla.ops.light_post import BIAS, MEAN, RSTD, STATISTICS, A
from timm_mrla.ops.light_post_backward import gradient_maps as post_gradient_maps
from timm_mrla.ops.light_pre import whole
from timm_mrla.ops.light_pre_backward import gradient_maps as pre_gradient_maps
from timm_mrla.ops.light_pre_backward import gradient_y
from timm_mrla.ops.operator import operator


@triton.jit
def _load_gradient(d_ptr, s_ptr, m, channels_ptr, b, at, mask, ch, P, L, C):
    """The gradient [BP, BC] of the norm of m, or of m without channels. Reads d."""
    d = load(d_ptr + (b * (P + L) + P) * C, at, mask)
    if s_ptr is not None:
        d *= tl.load(s_ptr + b)
    if channels_ptr is not None:
        z = load_channels(channels_ptr + A * C, ch, C) * m + load_channels(channels_ptr + BIAS * C, ch, C)
        d = tl.where(z > 0, d, 0.0)
    return d


@kernel
def _gradient_sums(
    d_ptr,
    table_ptr,
    a_ptr,
    v_ptr,
    channels_ptr,
    s_ptr,
    m_ptr,
    sums_ptr,
    back_ptr,
    P,
    L,
    C,
    T,
    heads,
    ENTRIES: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes sums for the gradients of a and the norm. Reads d and T values; with channels, writes m.

    R blocks of positions; z is the gradient of the norm. sums [R, T, ENTRIES, C] are of z * v_t and, if ENTRIES is 3,
    v_t and (m - mean) * v_t; back [R, 2, C] of z and z * (m - mean). With channels, values are read again from cache.
    """
    row = tl.program_id(0)
    b, at, mask, ch = block(row, tl.cdiv(L, BP), L, C, BP, BC)
    m = tl.zeros(at.shape, tl.float32)
    if channels_ptr is not None:
        m = retrieve(table_ptr, a_ptr, v_ptr, b, at, mask, ch, L, C, T, heads)
        m = m.to(m_ptr.dtype.element_ty)  # rounded as forward stored it: otherwise the ReLU's mask could differ
        tl.store(m_ptr + b * L * C + at, m, mask=mask)
        m = m.to(tl.float32)
    d = _load_gradient(d_ptr, s_ptr, m, channels_ptr, b, at, mask, ch, P, L, C)
    if channels_ptr is not None:
        m -= load_channels(channels_ptr + MEAN * C, ch, C)
        back_ptr += row.to(tl.int64) * 2 * C + ch
        tl.store(back_ptr, tl.sum(d, 0), mask=ch < C)
        tl.store(back_ptr + C, tl.sum(d * m, 0), mask=ch < C)
    sums_ptr += row.to(tl.int64) * T * ENTRIES * C + ch
    for t in range(T):
        v = load(address(table_ptr, t, v_ptr) + b * L * C, at, mask)
        tl.store(sums_ptr + t * ENTRIES * C, tl.sum(d * v, 0), mask=ch < C)
        if ENTRIES == 3:
            tl.store(sums_ptr + (t * ENTRIES + 1) * C, tl.sum(v, 0), mask=ch < C)
            tl.store(sums_ptr + (t * ENTRIES + 2) * C, tl.sum(m * v, 0), mask=ch < C)


@kernel
def _gradient_statistics(
    back_ptr, channels_ptr, linear_ptr, vectors_ptr, R, C, inverse, BR: tl.constexpr, BC: tl.constexpr
):
    """Computes vectors [C, 2], the gradients of gamma and beta, from back [R, 2, C]. Reads no map.

    linear [2, C]: dm = A * z - linear0 * (m - mean) - linear1, where z is the gradient of the norm. inverse is
    1 / (B * L), or 0 with running statistics.
    """
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = ch < C
    sz = tl.zeros((BR, BC), tl.float32)
    sm = sz
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        ok = (r < R)[:, None] & mask[None, :]
        at = r[:, None].to(tl.int64) * 2 * C + ch[None, :]
        sz += load(back_ptr, at, ok)
        sm += load(back_ptr + C, at, ok)
    a = load(channels_ptr + A * C, ch, mask)
    rstd = load(channels_ptr + RSTD * C, ch, mask)
    dbeta = tl.sum(sz, 0)
    dgamma = tl.sum(sm, 0) * rstd
    tl.store(vectors_ptr + 2 * ch, dgamma, mask=mask)
    tl.store(vectors_ptr + 2 * ch + 1, dbeta, mask=mask)
    tl.store(linear_ptr + ch, a * dgamma * rstd * inverse, mask=mask)
    tl.store(linear_ptr + C + ch, a * dbeta * inverse, mask=mask)


@kernel
def _gradient_weights(
    sums_ptr, channels_ptr, linear_ptr, da_ptr, C, ROWS, T, ENTRIES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Computes da [B, T, C], the gradient of a by channel, from image sums [ROWS, T, ENTRIES, C]. Reads no map."""
    b, t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    ch = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.zeros((BR, BC), tl.float32)
    sv = s
    sm = s
    for r0 in range(0, ROWS, BR):
        r = r0 + tl.arange(0, BR)
        ok = (r < ROWS)[:, None] & (ch < C)[None, :]
        at = ((b * ROWS + r[:, None]) * T + t) * ENTRIES * C + ch[None, :]
        s += load(sums_ptr, at, ok)
        if ENTRIES == 3:
            sv += load(sums_ptr + C, at, ok)
            sm += load(sums_ptr + 2 * C, at, ok)
    da = tl.sum(s, 0)
    if channels_ptr is not None:
        da *= load(channels_ptr + A * C, ch, ch < C)
    if ENTRIES == 3:
        da -= load(linear_ptr, ch, ch < C) * tl.sum(sm, 0) + load(linear_ptr + C, ch, ch < C) * tl.sum(sv, 0)
    tl.store(da_ptr + (b * T + t) * C + ch, da, mask=ch < C)


@kernel
def _attend_backward(
    y_ptr,
    qk_ptr,
    table_ptr,
    a_ptr,
    da_ptr,
    dk_ptr,
    heads_ptr,
    dkeys_ptr,
    dqk_ptr,
    buffer_ptr,
    e_ptr,
    B,
    C,
    K,
    T,
    STRIDE,
    heads,
    inverse,
    scale,
    BC: tl.constexpr,
    HB: tl.constexpr,
    D: tl.constexpr,
):
    """Computes for each image the gradients of earlier keys [T - 1, C], of qk [2, K], and e [C]. Reads no map.

    e is the gradient of x at each position through the channel means. da [T, C] is the gradient of a for each channel,
    dk [C] the key's gradient from later blocks. heads [heads, T] and buffer [2, C] are scratch shared by threads.
    """
    b = tl.program_id(0).to(tl.int64)
    y_ptr += b * C
    buffer_ptr += b * 2 * C
    d = C // heads
    i = tl.arange(0, D)
    for h0 in range(0, heads, HB):
        head = h0 + tl.arange(0, HB)
        at = (b * heads + head) * T
        c = head[:, None] * d + i[None, :]
        ok = (head < heads)[:, None] & (i < d)[None, :]
        q, k = query_key(y_ptr, qk_ptr, c, ok, C, K, inverse)
        dot = tl.zeros((HB,), tl.float32)
        for t in range(T):
            da = tl.sum(load(da_ptr + (b * T + t) * C, c, ok), 1)
            tl.store(heads_ptr + at + t, da, mask=head < heads)
            dot += da * load(a_ptr, at + t, head < heads)
        tl.debug_barrier()
        dq = tl.zeros((HB, D), tl.float32)
        for t in range(T - 1):
            ds = load(a_ptr, at + t, head < heads) * (load(heads_ptr, at + t, head < heads) - dot) * scale
            dq += ds[:, None] * load(address(table_ptr + STRIDE, t, y_ptr) + b * C, c, ok)
            tl.store(dkeys_ptr + (t * B + b) * C + c, ds[:, None] * q, mask=ok)
        at += T - 1
        ds = load(a_ptr, at, head < heads) * (load(heads_ptr, at, head < heads) - dot) * scale
        dk = ds[:, None] * q
        if dk_ptr is not None:
            dk += load(dk_ptr + b * C, c, ok)
        tl.store(buffer_ptr + c, dq + ds[:, None] * k, mask=ok)
        tl.store(buffer_ptr + C + c, dk, mask=ok)
    tl.debug_barrier()
    query_key_backward(y_ptr, qk_ptr, buffer_ptr, dqk_ptr + b * 2 * K, e_ptr + b * C, C, K, inverse, BC)


@kernel
def _gradient_values(
    d_ptr,
    a_ptr,
    m_ptr,
    channels_ptr,
    linear_ptr,
    s_ptr,
    later_ptr,
    dvalues_ptr,
    dv_ptr,
    B,
    P,
    L,
    C,
    T,
    heads,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Computes the gradients of all values. Reads d, m, and later: v's gradient from later blocks. Writes T maps.

    dvalues [T - 1, B, L, C] is this block's part of the gradients of earlier values, dv [B, N, C] v's whole gradient.
    """
    b, at, mask, ch = block(tl.program_id(0), tl.cdiv(L, BP), L, C, BP, BC)
    m = tl.zeros(at.shape, tl.float32)
    if channels_ptr is not None:
        m = load(m_ptr + b * L * C, at, mask)
    dm = _load_gradient(d_ptr, s_ptr, m, channels_ptr, b, at, mask, ch, P, L, C)
    if channels_ptr is not None:
        away = m - load_channels(channels_ptr + MEAN * C, ch, C)
        dm *= load_channels(channels_ptr + A * C, ch, C)
        dm -= load_channels(linear_ptr, ch, C) * away + load_channels(linear_ptr + C, ch, C)
    for t in range(T - 1):
        dv = load_weight(a_ptr, b, t, ch, C, T, heads) * dm
        tl.store(dvalues_ptr + (t * B + b) * L * C + at, dv.to(dvalues_ptr.dtype.element_ty), mask=mask)
    dv = load_weight(a_ptr, b, T - 1, ch, C, T, heads) * dm
    if later_ptr is not None:
        dv += load(later_ptr + b * L * C, at, mask)
    tl.store(dv_ptr + (b * (P + L) + P) * C + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@operator('timm_mrla::base_backward')
def backward(
    d: torch.Tensor,
    dk: torch.Tensor | None,
    later: torch.Tensor | None,
    x: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    grid: list[int],
    qk: torch.Tensor,
    w: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    y: torch.Tensor,
    a: torch.Tensor,
    statistics: torch.Tensor,
    post: bool,
    train: bool,
    rms: bool,
    value_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, earlier keys [T - 1, B, C] and values [T - 1, B, H, W, C], qk, w and the norm [C, 2].

    dk and later are the gradients of this block's key and value from later blocks. The value is computed again, because
    a saved value would cost a map in the last block of a stage. train: the norm used batch statistics.
    """
    keys, values, w = aligned(keys), aligned(values), by_tap(w)
    d, later = d.contiguous(), None if later is None else later.contiguous(memory_format=torch.channels_last)
    (B, N, C), (H, W), (_, heads, T) = x.shape, grid, a.shape
    L, P, channels = H * W, N - H * W, statistics if post else None
    v, _ = compute_value(x, grid, w, value_dtype, (None, None, None) if post else (weight, bias, statistics))
    table = addresses([*keys, y], [*values, v])  # y is a placeholder: nothing reads this block's key
    R, entries = B * cdiv(L, SUMS['BP']), 3 if train else 1
    m, back, linear = (torch.empty_like(v), *x.new_empty(2 * R + 2, C, dtype=torch.float32).split([2 * R, 2]))
    sums, da = x.new_empty(R * T * entries + B * T, C, dtype=torch.float32).split([R * T * entries, B * T])
    vectors = x.new_empty(C, 2, dtype=torch.float32)
    sizes = P, L, C, T, heads
    _gradient_sums[grid_of(B, L, C, **SUMS)](
        d, table, a, v, channels, s, m, sums, back, *sizes, ENTRIES=entries, **SUMS
    )
    if post:
        _gradient_statistics[(cdiv(C, STATISTICS['BC']),)](
            back, channels, linear, vectors, R, C, 1 / (B * L) if train else 0.0, **STATISTICS
        )
    _gradient_weights[(B * T, cdiv(C, 32))](sums, channels, linear, da, C, R // B, T, ENTRIES=entries, BR=16, BC=32)

    scratch = x.new_empty(B * (3 * C + heads * T + 2 * qk.shape[-1]), dtype=torch.float32)
    e, buffer, by_head, dqk = scratch.split([B * C, 2 * B * C, B * heads * T, 2 * B * qk.shape[-1]])
    dkeys = x.new_empty(T - 1, B, C, dtype=torch.float32)
    gradients, scale, blocks = (da, dk, by_head, dkeys, dqk, buffer, e), (C // heads) ** -0.5, head_blocks(C, heads)
    _attend_backward[(B,)](
        y, qk, table, a, *gradients, B, C, qk.shape[-1], T, T, heads, 1 / L, scale, **blocks, num_warps=8
    )
    dqk = total(dqk.view(B, 1, -1), qk.dtype).view_as(qk)

    dvalues, dv = v.new_empty(T - 1, B, H, W, C), torch.empty_like(x, dtype=v.dtype)
    _gradient_values[grid_of(B, L, C, **BLOCK)](d, a, m, channels, linear, s, later, dvalues, dv, B, *sizes, **BLOCK)
    dx = torch.empty_like(x)
    programs, n, tiles = row_grid((B, C, H, W), **VALUE)
    taps = x.new_empty(B * n, 9, C, dtype=torch.float32)
    if post:
        post_gradient_maps[programs](x, d, dv, w, None, e, None, dx, None, taps, H, W, C, n, tiles, heads, **VALUE)
    else:
        dy = torch.empty_like(dv)
        gradient_y[programs](x, dv, w, e, weight, bias, statistics, dy, taps, H, W, P, C, n, tiles, **VALUE)
        n, per_row, blocks = whole(x, 1024)
        rows = x.new_empty(B * n, 2, C, dtype=torch.float32)
        maps, sizes = (x, None, d, dy, None, weight, None, s, statistics, dx, None, rows), (P, N, C, n, per_row)
        pre_gradient_maps[(B * n,)](*maps, *sizes, RMS=rms, **blocks)
        vectors = total(rows, torch.float32)
    return dx, dkeys, dvalues, dqk, total(taps, w.dtype).view(C, 1, 3, 3), vectors
