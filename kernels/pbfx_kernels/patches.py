"""The patches of a convolution as rows of a matrix, for channels that no descriptor can load.

    row p = x at the taps of output position p, (tap, channel), zeros in the padding and at the end

Shapes: P = B * H' * W' positions, K = channels * taps inputs. The matrix is K / (stride² channels)
times the input, so this is for images: few channels, and outputs that are several times as large.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import math

import triton
import triton.language as tl
from torch import Tensor

from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, on_device

# A tile that one warp reads along positions, where the input is dense, and that four write along
# inputs.
_BLOCK_P, _BLOCK_K = 128, 16


@triton.jit
def _patches_kernel(
    rows,
    x,
    P,
    S,
    OUT_WIDTH,
    HEIGHT,
    WIDTH,
    K,
    ROW,
    x_b,
    x_c,
    x_h,
    x_w,
    CHANNELS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Blocks of one position's inputs run next to each other: they read the same part of x.
    blocks_k = tl.cdiv(ROW, BLOCK_K)
    pid = tl.program_id(0)
    p = (pid // blocks_k).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = pid % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    tap, channel = k // CHANNELS, k % CHANNELS
    place = (p % S).to(tl.int32)
    row = (place // OUT_WIDTH * STRIDE_H - PAD_H)[None, :] + (tap // TAPS_W * DILATION_H)[:, None]
    column = (place % OUT_WIDTH * STRIDE_W - PAD_W)[None, :] + (tap % TAPS_W * DILATION_W)[:, None]
    at = (p // S)[None, :] * x_b + channel.to(tl.int64)[:, None] * x_c
    at += row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    inside &= (k < K)[:, None] & (p < P)[None, :]
    tile = tl.trans(tl.load(x + at, mask=inside, other=0.0))
    tl.store(rows + p[:, None] * ROW + k[None, :], tile, mask=(p < P)[:, None] & (k < ROW)[None, :])


def patches(
    x: Tensor, kernel: tuple[int, int], geometry: Geometry, sizes: tuple[int, int], aligned: int
) -> Tensor:
    """Lay out the patches of a convolution.

    Args:
        x: `(B, channels, H, W)`, any strides, not empty.
        kernel: taps, `(kH, kW)`.
        geometry: over two dimensions, one group, not transposed.
        sizes: `(H', W')`, of the output.
        aligned: what the length of a row is rounded up to a multiple of, with zeros.

    Returns:
        `(B, H', W', K)` contiguous, dtype of `x`, taps before channels.
    """
    images, channels, height, width = x.shape
    inputs = channels * math.prod(kernel)
    length = ceiling(inputs, aligned) * aligned
    rows = x.new_empty((images, *sizes, length))
    positions = images * math.prod(sizes)
    with on_device(x):
        _patches_kernel[(ceiling(positions, _BLOCK_P) * ceiling(length, _BLOCK_K),)](
            rows,
            x,
            positions,
            math.prod(sizes),
            sizes[1],
            height,
            width,
            inputs,
            length,
            *x.stride(),
            CHANNELS=channels,
            STRIDE_H=geometry.stride[0],
            STRIDE_W=geometry.stride[1],
            PAD_H=geometry.padding[0],
            PAD_W=geometry.padding[1],
            DILATION_H=geometry.dilation[0],
            DILATION_W=geometry.dilation[1],
            TAPS_W=kernel[1],
            BLOCK_P=_BLOCK_P,
            BLOCK_K=_BLOCK_K,
        )
    return rows
