"""The patches of a convolution as rows of a matrix, for channels that no descriptor can load.

    row p = x at the taps of output position p, (tap, channel), zeros in the padding and at the end

Shapes: P = B * H' * W' positions, K = channels * taps inputs. The matrix is K / (stride² channels)
times the input, so this is for images: few channels, and outputs that are several times as large.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import math

import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import box_of
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, on_device
from pbfx_kernels.relaunch import relaunched

# Positions of a tile, a thread each, and inputs that are loaded at a time.
_BLOCK_P, _MOST_K = 128, 32


@relaunched
def _patches_kernel(
    rows,
    x,
    IMAGES,
    OUT_HEIGHT,
    OUT_WIDTH,
    HEIGHT,
    WIDTH,
    x_b,
    x_c,
    x_h,
    x_w,
    K: tl.constexpr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_W: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_h, blocks_w = tl.cdiv(OUT_HEIGHT, BLOCK_H), tl.cdiv(OUT_WIDTH, BLOCK_W)
    box = tl.program_id(0)
    image = box // (blocks_h * blocks_w) * BLOCK_B
    top, left = box // blocks_w % blocks_h * BLOCK_H, box % blocks_w * BLOCK_W
    # A box is a power of two each way, so that places in it take no division.
    q = tl.arange(0, BLOCK_B * BLOCK_H * BLOCK_W)
    b, h, w = image + q // (BLOCK_H * BLOCK_W), top + q // BLOCK_W % BLOCK_H, left + q % BLOCK_W
    real = (b < IMAGES) & (h < OUT_HEIGHT) & (w < OUT_WIDTH)
    row_0, column_0 = h * STRIDE_H - PAD_H, w * STRIDE_W - PAD_W
    # One image's elements are counted in 32 bits.
    start = x + b.to(tl.int64) * x_b + (row_0 * x_h + column_0 * x_w)
    rows += ((b * OUT_HEIGHT + h).to(tl.int64) * OUT_WIDTH + w) * ROW
    # Unrolled: which tap and channel an input is, a thread then knows while it is compiled.
    for k_0 in tl.static_range(0, ROW, BLOCK_K):
        k = k_0 + tl.arange(0, BLOCK_K)
        tap, channel = k // CHANNELS, k % CHANNELS
        down, along = tap // TAPS_W * DILATION_H, tap % TAPS_W * DILATION_W
        row, column = row_0[:, None] + down[None, :], column_0[:, None] + along[None, :]
        inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        inside &= real[:, None] & (k < K)[None, :]
        step = channel * x_c + down * x_h + along * x_w
        tile = tl.load(start[:, None] + step[None, :], mask=inside, other=0.0)
        tl.store(rows[:, None] + k[None, :], tile, mask=real[:, None])


def depth_of(length: int) -> int:
    """Return how many inputs of a row are loaded at a time: a power of two that divides it."""
    return min(_MOST_K, length & -length)


def patches(
    x: Tensor, kernel: tuple[int, int], geometry: Geometry, sizes: tuple[int, int], length: int
) -> Tensor:
    """Lay out the patches of a convolution.

    Args:
        x: `(B, channels, H, W)`, any strides, not empty.
        kernel: taps, `(kH, kW)`.
        geometry: over two dimensions, one group, not transposed.
        sizes: `(H', W')`, of the output.
        length: of a row, K or more.

    Returns:
        `(B, H', W', length)` contiguous, dtype of `x`, taps before channels, then zeros.
    """
    images, channels, height, width = x.shape
    if sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True)) >> 31:
        x = x.contiguous()
    rows = x.new_empty((images, *sizes, length))
    box = box_of(_BLOCK_P, images, *sizes)
    boxes = math.prod(ceiling(n, each) for n, each in zip(rows.shape[:3], box, strict=True))
    with on_device(x):
        _patches_kernel[(boxes,)](
            rows,
            x,
            *rows.shape[:3],
            height,
            width,
            *x.stride(),
            K=channels * math.prod(kernel),
            ROW=length,
            CHANNELS=channels,
            STRIDE_H=geometry.stride[0],
            STRIDE_W=geometry.stride[1],
            PAD_H=geometry.padding[0],
            PAD_W=geometry.padding[1],
            DILATION_H=geometry.dilation[0],
            DILATION_W=geometry.dilation[1],
            TAPS_W=kernel[1],
            BLOCK_B=box[0],
            BLOCK_H=box[1],
            BLOCK_W=box[2],
            BLOCK_K=depth_of(length),
        )
    return rows
