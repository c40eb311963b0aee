"""The memory of MRLA-base: computes the value of a block, and lets kernels read the keys and values of all blocks.

Each key and value is a separate tensor, and their number differs between launches. So a kernel gets a table
[2, STRIDE] of addresses, first of the values, then of the keys, and loops over it.
"""

import torch
import triton
import triton.language as tl

from timm_mrla.ops.common import cdiv, kernel, load_channels, load_map, positions, row_grid, stencil, store_map
from timm_mrla.ops.light_pre import load_vector, normed_stencil

# tile sizes: rows, columns, channels, warps; the same as for MRLA-light
VALUE = {'TH': 2, 'TW': 4, 'BC': 64, 'num_warps': 4}
ADDRESSES = 8  # number of values, and of keys, in one launch of _store_addresses


@kernel
def _store_addresses(
    table_ptr, STRIDE, v0, v1, v2, v3, v4, v5, v6, v7, k0, k1, k2, k3, k4, k5, k6, k7, N: tl.constexpr
):
    """Write the addresses of N values and N keys into the table [2, STRIDE]. Reads no map."""
    values = (v0, v1, v2, v3, v4, v5, v6, v7)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7)
    for i in tl.static_range(N):
        tl.store(table_ptr + i, values[i].to(tl.int64))
        tl.store(table_ptr + STRIDE + i, keys[i].to(tl.int64))


@triton.jit
def address(table_ptr, t, like):
    """The pointer in entry t of the table, of the same type as `like`. It must be a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(table_ptr + t).to(like.dtype), 16)


@triton.jit
def block(row, ROWS, L, C, BP: tl.constexpr, BC: tl.constexpr):
    """For one block of positions: the image, the offsets [BP, BC] in it, their mask, and the channels [BC]."""
    ch = tl.program_id(1) * BC + tl.arange(0, BC)
    p = (row % ROWS) * BP + tl.arange(0, BP)
    return (row // ROWS).to(tl.int64), p[:, None] * C + ch[None, :], (p < L)[:, None] & (ch < C)[None, :], ch


@triton.jit
def load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_weight(a_ptr, b, t, ch, C, T, heads):
    """The attention weights of block t in one image, for each channel, [1, BC]."""
    return tl.load(a_ptr + (b * heads + ch // (C // heads)) * T + t, mask=ch < C, other=0.0)[None, :]


@triton.jit
def retrieve(table_ptr, a_ptr, like, b, at, mask, ch, L, C, T, heads):
    """m = sum_t a_t * v_t, [BP, BC]. Reads a tile of each value."""
    m = tl.zeros(at.shape, tl.float32)
    for t in range(T):
        v = load(address(table_ptr, t, like) + b * L * C, at, mask)
        m += load_weight(a_ptr, b, t, ch, C, T, heads) * v
    return m


def aligned(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copy tensors that are not aligned to 16 bytes, because the kernels assume this alignment of keys and values."""
    return [t.clone() if t.data_ptr() % 16 else t for t in tensors]


def addresses(keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """The table [2, T] of the addresses of values and keys."""
    T = len(values)
    table = torch.empty(2, T, dtype=torch.int64, device=values[0].device)
    for i in range(0, T, ADDRESSES):
        some = [tensors[i : i + ADDRESSES] for tensors in (values, keys)]
        pointers = [p for tensors in some for p in tensors + tensors[:1] * (ADDRESSES - len(tensors))]
        _store_addresses[(1,)](table[:, i:], T, *pointers, N=len(some[0]))
    return table


def grid_of(B: int, L: int, C: int, BP: int, BC: int, **_) -> tuple[int, int]:
    """The launch grid of a kernel in which a program works on one block of positions."""
    return B * cdiv(L, BP), cdiv(C, BC)


@kernel
def _value(
    x_ptr,
    w_ptr,
    nw_ptr,
    nb_ptr,
    stats_ptr,
    v_ptr,
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
    """Computes v, the stencil of x or, with stats, of x after its norm. Reads x, writes one map.

    rows [B * ROWS, C]: sums of x, or None.
    """
    row, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    b = (row // ROWS).to(tl.int64)
    N = P + H * W
    x_ptr += (b * N + P) * C
    v_ptr += b * H * W * C
    first = (row % ROWS) * TILES
    s = tl.zeros((TH * TW, BC), tl.float32)
    for tile in range(first, min(first + TILES, tl.cdiv(H, TH) * tl.cdiv(W, TW))):
        h, w = positions(tile, W, TH, TW)
        if stats_ptr is None:
            v = stencil(x_ptr, w_ptr, h, w, ch, H, W, C)
            if rows_ptr is not None:
                s += load_map(x_ptr, h, w, ch, H, W, C)
        else:
            weight, bias = load_channels(nw_ptr, ch, C), load_vector(nb_ptr, ch, C, 0.0)
            v = normed_stencil(x_ptr, stats_ptr + b * 4 * N + P, w_ptr, weight, bias, h, w, ch, H, W, C, N)
        store_map(v_ptr, v, h, w, ch, H, W, C)
    if rows_ptr is not None:
        tl.store(rows_ptr + row.to(tl.int64) * C + ch, tl.sum(s, 0), mask=ch < C)


def compute_value(
    x: torch.Tensor,
    grid: list[int],
    w: torch.Tensor,
    dtype: torch.dtype,
    normed: tuple[torch.Tensor | None, ...] = (None, None, None),
    sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the value v in dtype, and if wanted, sums of x over rows [B, n, C], which the form `post` needs.

    w [9, C]: weights. normed: weight, bias and statistics of the norm of x in the form `pre`.
    """
    (B, N, C), (H, W) = x.shape, grid
    programs, n, tiles = row_grid((B, C, H, W), **VALUE)
    v = torch.empty(B, C, H, W, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    rows = x.new_empty(B, n, C, dtype=torch.float32) if sums else None
    _value[programs](x, w, *normed, v, rows, H, W, N - H * W, C, n, tiles, **VALUE)
    return v, rows
