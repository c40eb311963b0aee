"""Functions shared by all kernels: tiles of a map, the 3x3 stencil, query and key, the gate of MRLA-light.

A map [B, C, H, W] is stored as [B, H * W, C]. A program works on a tile of TH x TW positions and BC channels at a time.
A row is the part of an image that one program sums: some of its tiles. Rows are summed in a fixed order, without
atomics, so results are reproducible bit by bit. All arithmetic is in float32.
"""

# ruff: noqa: RUF005  Triton has no unpacking of tuples

import functools

import torch
import triton
import triton.language as tl

PROGRAMS = 1000  # about how many programs a summing kernel gets: several for each multiprocessor of a large GPU

# compile again for a new dtype, and for C divisible by 16 or not, but not for each size of the map
kernel = triton.jit(
    do_not_specialize=[
        'B',
        'H',
        'W',
        'P',
        'R',
        'K',
        'ROWS',
        'TILES',
        'PER_ROW',
        'STRIDE',
        'heads',
        'T',
        'L',
        'inverse',
        'scale',
        'eps',
    ]
)


@triton.jit
def positions(tile, W, TH: tl.constexpr, TW: tl.constexpr):
    """Row and column of each position of a tile, [TH * TW]."""
    p = tl.arange(0, TH * TW)
    tiles_w = tl.cdiv(W, TW)
    return (tile // tiles_w) * TH + p // TW, (tile % tiles_w) * TW + p % TW


@triton.jit
def is_inside(h, w, H, W):
    """Whether positions are inside the map."""
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def load_map(ptr, h, w, ch, H, W, C):
    """Load the values [positions, BC] of a map, zero outside of it."""
    mask = is_inside(h, w, H, W)[:, None] & (ch < C)[None, :]
    return tl.load(ptr + (h * W + w)[:, None] * C + ch[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_map(ptr, x, h, w, ch, H, W, C):
    """Write the values [positions, BC] of a map."""
    mask = is_inside(h, w, H, W)[:, None] & (ch < C)[None, :]
    tl.store(ptr + (h * W + w)[:, None] * C + ch[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(ptr, ch, C):
    """Load a vector of channels as [1, BC]."""
    return tl.load(ptr + ch, mask=ch < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_gate(g_ptr, b, ch, C, heads):
    """Load the gates of one image for each channel, [1, BC]."""
    return tl.load(g_ptr + b * heads + ch // (C // heads), mask=ch < C, other=0.0)[None, :]


@triton.jit
def stencil(ptr, w_ptr, h, w, ch, H, W, C):
    """The depthwise 3x3 convolution of a map, [positions, BC]; weights [9, C]."""
    v = load_map(ptr, h - 1, w - 1, ch, H, W, C) * load_channels(w_ptr, ch, C)
    for i in tl.static_range(1, 9):
        v += load_map(ptr, h + (i // 3 - 1), w + (i % 3 - 1), ch, H, W, C) * load_channels(w_ptr + i * C, ch, C)
    return v


@triton.jit
def transposed_stencil(ptr, x, taps, w_ptr, h, w, ch, H, W, C):
    """From the gradient of v at ptr: the gradient of the stencil's input, and taps plus the gradient of its weights.

    x is the stencil's input; all are [positions, BC].
    """
    u = tl.zeros_like(x)
    sums = ()
    for i in tl.static_range(9):
        dv = load_map(ptr, h - (i // 3 - 1), w - (i % 3 - 1), ch, H, W, C)
        u += dv * load_channels(w_ptr + i * C, ch, C)
        sums = sums + (taps[i] + dv * x,)
    return u, sums


@triton.jit
def store_taps(ptr, taps, g, ch, C):
    """Write the gradients [9, C] of the stencil's weights: taps times g, summed over the positions."""
    for i in tl.static_range(9):
        tl.store(ptr + i * C + ch, tl.sum(taps[i] * g, 0), mask=ch < C)


@triton.jit
def query_key(y_ptr, qk_ptr, c, ok, C, K, inverse):
    """Query and key of channels c: 1-d convolutions of the channel means y * inverse."""
    q = tl.zeros(c.shape, tl.float32)
    k = tl.zeros(c.shape, tl.float32)
    for j in range(K):
        at = c + (j - K // 2)
        y = tl.load(y_ptr + at, mask=ok & (at >= 0) & (at < C), other=0.0) * inverse
        q += y * tl.load(qk_ptr + j).to(tl.float32)
        k += y * tl.load(qk_ptr + K + j).to(tl.float32)
    return q, k


@triton.jit
def image_sums(sums_ptr, y_ptr, C, ROWS, STRIDE, BR: tl.constexpr, BC: tl.constexpr):
    """Write y [C], the sum of rows [ROWS, STRIDE] of an image. After it, all threads of the program can read y."""
    for c0 in range(0, C, BC):
        ch = c0 + tl.arange(0, BC)
        y = tl.zeros((BR, BC), tl.float32)
        for r0 in range(0, ROWS, BR):
            r = r0 + tl.arange(0, BR)
            mask = (r < ROWS)[:, None] & (ch < C)[None, :]
            y += tl.load(sums_ptr + r[:, None] * STRIDE + ch[None, :], mask=mask, other=0.0)
        tl.store(y_ptr + ch, tl.sum(y, 0), mask=ch < C)
    tl.debug_barrier()


@kernel
def gate(
    sums_ptr,
    y_ptr,
    qk_ptr,
    g_ptr,
    C,
    ROWS,
    STRIDE,
    K,
    heads,
    inverse,
    scale,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HB: tl.constexpr,
    D: tl.constexpr,
):
    """Computes for each image y [C], the sum of rows [ROWS, STRIDE], and g [heads] = sigmoid(<q, k> * scale).

    Reads no map. STRIDE is the distance between two rows; inverse is 1 / (H * W).
    """
    b = tl.program_id(0).to(tl.int64)
    y_ptr += b * C
    image_sums(sums_ptr + b * ROWS * STRIDE, y_ptr, C, ROWS, STRIDE, BR, BC)
    d = C // heads
    i = tl.arange(0, D)
    for h0 in range(0, heads, HB):
        head = h0 + tl.arange(0, HB)
        ok = (head < heads)[:, None] & (i < d)[None, :]
        q, k = query_key(y_ptr, qk_ptr, head[:, None] * d + i[None, :], ok, C, K, inverse)
        tl.store(g_ptr + b * heads + head, tl.sigmoid(tl.sum(q * k, 1) * scale), mask=head < heads)


@kernel
def gate_backward(
    y_ptr,
    qk_ptr,
    g_ptr,
    dg_ptr,
    dqk_ptr,
    buffer_ptr,
    e_ptr,
    C,
    ROWS,
    STRIDE,
    K,
    heads,
    inverse,
    scale,
    BC: tl.constexpr,
    HB: tl.constexpr,
    D: tl.constexpr,
):
    """Computes for each image the gradient of qk [2, K], and e [C], the gradient of x per position. Reads no map.

    dg [ROWS, STRIDE] is the gradient of the gates for each row and channel; buffer [2, C] is scratch.
    """
    b = tl.program_id(0).to(tl.int64)
    y_ptr += b * C
    dg_ptr += b * ROWS * STRIDE
    buffer_ptr += b * 2 * C
    d = C // heads
    i = tl.arange(0, D)
    for h0 in range(0, heads, HB):
        head = h0 + tl.arange(0, HB)
        c = head[:, None] * d + i[None, :]
        ok = (head < heads)[:, None] & (i < d)[None, :]
        q, k = query_key(y_ptr, qk_ptr, c, ok, C, K, inverse)
        g = tl.load(g_ptr + b * heads + head, mask=head < heads, other=0.0)
        dg = tl.zeros(c.shape, tl.float32)
        for r in range(ROWS):
            dg += tl.load(dg_ptr + r * STRIDE + c, mask=ok, other=0.0)
        ds = tl.sum(dg, 1) * g * (1 - g) * scale
        tl.store(buffer_ptr + c, ds[:, None] * k, mask=ok)
        tl.store(buffer_ptr + C + c, ds[:, None] * q, mask=ok)
    tl.debug_barrier()
    query_key_backward(y_ptr, qk_ptr, buffer_ptr, dqk_ptr + b * 2 * K, e_ptr + b * C, C, K, inverse, BC)


@triton.jit
def query_key_backward(y_ptr, qk_ptr, buffer_ptr, dqk_ptr, e_ptr, C, K, inverse, BC: tl.constexpr):
    """Write dqk [2, K] and e [C] of one image, from buffer [2, C], the gradients of query and key."""
    for j in range(K):
        dq = tl.zeros((BC,), tl.float32)
        dk = tl.zeros((BC,), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            at = c + (j - K // 2)
            y = tl.load(y_ptr + at, mask=(c < C) & (at >= 0) & (at < C), other=0.0) * inverse
            dq += y * tl.load(buffer_ptr + c, mask=c < C, other=0.0)
            dk += y * tl.load(buffer_ptr + C + c, mask=c < C, other=0.0)
        tl.store(dqk_ptr + j, tl.sum(dq, 0))
        tl.store(dqk_ptr + K + j, tl.sum(dk, 0))
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        e = tl.zeros((BC,), tl.float32)
        for j in range(K):
            at = c - (j - K // 2)
            ok = (c < C) & (at >= 0) & (at < C)
            e += tl.load(qk_ptr + j).to(tl.float32) * tl.load(buffer_ptr + at, mask=ok, other=0.0)
            e += tl.load(qk_ptr + K + j).to(tl.float32) * tl.load(buffer_ptr + C + at, mask=ok, other=0.0)
        tl.store(e_ptr + c, e * inverse, mask=c < C)


@kernel
def sum_rows(rows_ptr, out_ptr, R, K, C, BR: tl.constexpr, BC: tl.constexpr):
    """Computes the sum [C, K] of rows [R, K, C]. Reads no map."""
    ch, k = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    s = tl.zeros((BR, BC), tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        mask = (r < R)[:, None] & (ch < C)[None, :]
        s += tl.load(rows_ptr + (r[:, None].to(tl.int64) * K + k) * C + ch[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + ch * K + k, tl.sum(s, 0).to(out_ptr.dtype.element_ty), mask=ch < C)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own function takes several microseconds, as its next_power_of_2 does."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def head_blocks(C: int, heads: int) -> dict[str, int]:
    """Block sizes of the kernels that loop over heads, such as `gate`: channels, heads, channels of a head."""
    D = power_of_2(C // heads)
    return {
        'BC': min(power_of_2(C), 256),
        'HB': max(1, min(power_of_2(heads), 512 // D)),
        'D': D,
    }


def split(tiles: int, programs: int) -> tuple[int, int]:
    """Split an image into rows: number of rows, tiles of a row. programs: launched for one row of every image."""
    per_row = cdiv(tiles, max(1, min(tiles, PROGRAMS // programs)))
    return cdiv(tiles, per_row), per_row


def row_grid(shape: tuple[int, ...], TH: int, TW: int, BC: int, **_) -> tuple[tuple[int, int], int, int]:
    """For a kernel that sums rows of maps [B, C, H, W]: launch grid, number of rows of an image, and tiles of a row."""
    B, C, H, W = shape
    programs = cdiv(C, BC)
    n, tiles = split(cdiv(H, TH) * cdiv(W, TW), B * programs)
    return (B * n, programs), n, tiles


def tile_grid(shape: tuple[int, ...], TH: int, TW: int, BC: int, **_) -> tuple[int, int]:
    """The launch grid of a kernel in which a program writes one tile of maps [B, C, H, W]."""
    B, C, H, W = shape
    return B * cdiv(H, TH) * cdiv(W, TW), cdiv(C, BC)


def by_tap(w: torch.Tensor) -> torch.Tensor:
    """Weights of the value [C, 1, 3, 3] -> [9, C], contiguous over the channels, as the kernels read them."""
    return w.flatten(1).t().contiguous()


def compute_gate(sums: torch.Tensor, qk: torch.Tensor, heads: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, C] and the gates [B, heads] from sums [B, rows, C] over the rows of maps of `positions` positions."""
    B, rows, C = sums.shape[0], sums.shape[1], sums.shape[-1]
    y, g = sums.new_empty(B, C), sums.new_empty(B, heads)
    sizes, scale, blocks = (C, rows, sums.stride(1), qk.shape[-1], heads), (C // heads) ** -0.5, head_blocks(C, heads)
    gate[(B,)](sums, y, qk, g, *sizes, 1 / positions, scale, BR=min(power_of_2(rows), 16), **blocks)
    return y, g


def compute_gate_backward(
    y: torch.Tensor, g: torch.Tensor, dg: torch.Tensor, qk: torch.Tensor, positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of qk, and e [B, C], the gradient of x at each position, from dg [B, rows, C]."""
    (B, C), heads, K = y.shape, g.shape[1], qk.shape[-1]
    e, scratch, dqk = y.new_empty(B * (3 * C + 2 * K)).split([B * C, 2 * B * C, 2 * B * K])
    sizes, scale = (C, dg.shape[1], dg.stride(1), K, heads), (C // heads) ** -0.5
    gate_backward[(B,)](y, qk, g, dg, dqk, scratch, e, *sizes, 1 / positions, scale, **head_blocks(C, heads))
    return total(dqk.view(B, 1, 2 * K), qk.dtype).view_as(qk), e.view(B, C)


def total(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum rows [R, K, C] to [C, K] in dtype."""
    R, K, C = rows.shape
    out = rows.new_empty(C, K, dtype=dtype)
    sum_rows[(cdiv(C, 32), K)](rows, out, R, K, C, BR=32, BC=32)
    return out
