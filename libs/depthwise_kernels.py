"""Triton kernels of the depthwise convolution for NVIDIA GPUs; only libs/depthwise.py calls them. Axes as there.

How they were reasoned. None of it is measured on a GPU yet (benchmarks/kernels.py is the command); checked are the
results in Triton's interpreter, and what is compiled for compute capability 9.0: at k = 7 in bfloat16, 163 and 168
registers, none spilled, and 392 multiply-adds among the 526 and 577 instructions of a thread's row. Were those issued
without a stall, 256 images of 32 x 32 x 480 would take some 0.3 ms on an H100, whose memory needs 0.15.

- Least traffic: x read once and the result written once; for the weights' gradient x and the gradient read once. A
  program therefore walks down a strip of an image, all rows of up to 32 columns of 32 channels. Every value is brought
  from memory once, but for the k // 2 columns on either side of a strip, which its neighbour reads at the same time.
- At k = 7 the 49 multiply-adds per value in float32 weigh about as much as its bytes in 16 bits, so the loop has to be
  multiply-adds and little else. A thread owns one channel of 8 adjacent columns. It holds the k k weights (or the sums
  of their gradient) and k rows of sums (or of gradients) in registers: k + 7 loads make 8 k k multiply-adds.
- The 32 threads of a warp are 32 adjacent channels: one access of adjacent bytes per column. The next row is asked for
  before the present one is used.
- The input's gradient is the same kernel with the taps in opposite order. The residual is one more at the centre tap.
- The weights' gradient: each strip of an image writes its own sums (5 % of the bytes it reads, at 32 x 32 in 16 bits),
  and torch.sum adds those up. No atomics, so the same inputs give the same bits. A program takes one strip and no more,
  as 64 images would not fill a GPU otherwise. What it reads becomes float32 as it enters the registers, once.

In Triton a tile is (GROUPS, CHANNELS): one value of every thread. What a thread has several of (columns, rows, taps) is
a tuple of tiles, whose loops are unrolled and whose indices the compiler knows, so that it stays in registers. The
grid's WIDTH and the number of channels, DIM, are constants too: within a row an address is another plus a constant.
"""

import triton
import triton.language as tl


@triton.jit
def load_row(
    image: tl.tensor,
    row: tl.tensor,
    height: tl.tensor,
    column: tl.tensor,
    channel: tl.tensor,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tuple:
    """COUNT tiles: adjacent columns of a row of image (h, w, D), the first at `column`; zeros outside the grid."""
    pointers = image + (row * WIDTH + column) * DIM + channel
    inside = (channel < DIM) & (row >= 0) & (row < height)
    tiles = ()
    for j in tl.static_range(COUNT):
        mask = inside & (column + j >= 0) & (column + j < WIDTH)
        tiles = tiles + (tl.load(pointers + j * DIM, mask=mask, other=0.0),)
    return tiles


@triton.jit
def to_float32(tiles: tl.tuple, COUNT: tl.constexpr) -> tl.tuple:
    """The first COUNT tiles in float32."""
    converted = ()
    for j in tl.static_range(COUNT):
        converted = converted + (tiles[j].to(tl.float32),)
    return converted


@triton.jit
def store_row(
    image: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    channel: tl.tensor,
    tiles: tl.tuple,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """The first COUNT tiles into adjacent columns of a row of image (h, w, D), if the row is not above the grid."""
    pointers = image + (row * WIDTH + column) * DIM + channel
    for j in tl.static_range(COUNT):
        mask = (channel < DIM) & (row >= 0) & (column + j < WIDTH)
        tl.store(pointers + j * DIM, tiles[j].to(image.dtype.element_ty), mask=mask)


@triton.jit
def convolve(
    x: tl.tensor,  # (B, h, w, D)
    taps: tl.tensor,  # (k k, D)
    bias: tl.tensor,  # (D,); not read without HAS_BIAS
    out: tl.tensor,  # (B, h, w, D)
    height: tl.tensor,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> None:
    """Grid: (strips of GROUPS * COLUMNS columns, blocks of CHANNELS, B)."""
    P: tl.constexpr = K // 2
    column = ((tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)) * COLUMNS)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    offset = tl.program_id(2).to(tl.int64) * height * WIDTH * DIM
    x += offset
    out += offset

    weights = ()
    for i in tl.static_range(K * K):
        tap = K * K - 1 - i if TRANSPOSED else i
        weight = tl.load(taps + tap * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        if RESIDUAL and i == K * K // 2:
            weight += 1.0
        weights = weights + (weight,)
    start = tl.zeros((GROUPS, CHANNELS), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)

    # At row r, sums[s * COLUMNS + j] belongs to row r - P + s of the result, complete at s = 0.
    sums = ()
    for _ in tl.static_range(K * COLUMNS):
        sums = sums + (start,)
    values = load_row(x, 0, height, column - P, channel, WIDTH, DIM, COLUMNS + K - 1)
    for r in range(height):
        following = load_row(x, r + 1, height, column - P, channel, WIDTH, DIM, COLUMNS + K - 1)
        added = ()
        for s in tl.static_range(K):
            for j in tl.static_range(COLUMNS):
                total = sums[s * COLUMNS + j]
                for kx in tl.static_range(K):
                    total += weights[(K - 1 - s) * K + kx] * values[j + kx].to(tl.float32)
                added = added + (total,)
        store_row(out, r - P, column, channel, added, WIDTH, DIM, COLUMNS)
        sums = ()
        for i in tl.static_range(K * COLUMNS):
            sums = sums + (added[i + COLUMNS] if i < (K - 1) * COLUMNS else start,)
        values = following
    for s in tl.static_range(P):  # the last rows, which rows outside the grid would complete
        rest = ()
        for j in tl.static_range(COLUMNS):
            rest = rest + (sums[s * COLUMNS + j],)
        store_row(out, height - P + s, column, channel, rest, WIDTH, DIM, COLUMNS)


@triton.jit
def weight_gradient(
    x: tl.tensor,  # (B, h, w, D)
    grad: tl.tensor,  # (B, h, w, D), of the result
    sums: tl.tensor,  # (B * strips, k k + 1, D), float32; the last of axis 1: the bias's
    height: tl.tensor,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Grid: (strips of GROUPS * COLUMNS columns, blocks of CHANNELS, B)."""
    P: tl.constexpr = K // 2
    column = ((tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)) * COLUMNS)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    offset = tl.program_id(2).to(tl.int64) * height * WIDTH * DIM
    x += offset
    grad += offset

    totals = ()
    for _ in tl.static_range(K * K + 1):
        totals = totals + (tl.zeros((GROUPS, CHANNELS), tl.float32),)
    # At row r of x, window[s * COLUMNS + j] is row r - P + s of the gradient: those that row r of x took part in.
    window = ()
    for s in tl.static_range(K):
        row = load_row(grad, s - P, height, column, channel, WIDTH, DIM, COLUMNS)
        window = window + to_float32(row, COLUMNS)
    values = to_float32(load_row(x, 0, height, column - P, channel, WIDTH, DIM, COLUMNS + K - 1), COLUMNS + K - 1)
    for r in range(height):
        entering = load_row(grad, r + P + 1, height, column, channel, WIDTH, DIM, COLUMNS)
        following = load_row(x, r + 1, height, column - P, channel, WIDTH, DIM, COLUMNS + K - 1)
        added = ()
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                total = totals[ky * K + kx]
                for j in tl.static_range(COLUMNS):
                    total += window[(K - 1 - ky) * COLUMNS + j] * values[j + kx]
                added = added + (total,)
        total = totals[K * K]
        for j in tl.static_range(COLUMNS):
            total += window[P * COLUMNS + j]
        totals = added + (total,)
        moved = ()
        for i in tl.static_range((K - 1) * COLUMNS):
            moved = moved + (window[i + COLUMNS],)
        window = moved + to_float32(entering, COLUMNS)
        values = to_float32(following, COLUMNS + K - 1)

    part = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    for i in tl.static_range(K * K + 1):
        tl.store(sums + (part * (K * K + 1) + i) * DIM + channel, tl.sum(totals[i], axis=0), mask=channel < DIM)
