"""The *fused* strategy for convolutions over two dimensions: soma and dendrites in one kernel.

    z_d = V_d * x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e     a_d = f(z_d)     out = W * x + b + Σ_d T_d ⊙ a_d

Shapes: B images, H' x W' output positions each, N neurons, D dendrites. An implicit GEMM whose
tiles are those of `fused_neuron`: weights interleaved, so that a tile of positions by neurons is
one wide product. The positions of a tile are a box of images by rows by columns, and for each tap
a descriptor loads the same box, shifted. What lies outside the image it fills with zeros, which is
all that there is to padding; steps of a stride are axes of their own, so that a box is dense.

Channels that a descriptor cannot load, such as an image's three, are laid out by `patches` first,
and are then a convolution with one tap.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks, box_of, conv_neuron_blocks
from pbfx_kernels.fused_neuron import apart, roles_of
from pbfx_kernels.geometry import Geometry
from pbfx_kernels.launching import ceiling, fast_activations, multiprocessors, on_device
from pbfx_kernels.relaunch import boxes, relaunched
from pbfx_kernels.shares import added
from pbfx_kernels.triton_math import cascade, link, negated_sum

POINTWISE = Geometry.convolution(2)


@relaunched
def _conv_neuron_kernel(
    out,
    kept,
    soma,
    x,
    weights,
    soma_bias,
    bias,
    to_soma,
    to_dendrite,
    IMAGES,
    HEIGHT,
    WIDTH,
    N,
    GROUP,
    kept_d,
    out_b,
    out_s,
    out_n,
    CHANNELS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    D: tl.constexpr,
    ROLES: tl.constexpr,
    MODE: tl.constexpr,
    KEEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_SOMA_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_P: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    BLOCK_P: tl.constexpr = BLOCK_B * BLOCK_H * BLOCK_W
    STEPS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    blocks_h, blocks_w = tl.cdiv(HEIGHT, BLOCK_H), tl.cdiv(WIDTH, BLOCK_W)
    blocks_p = tl.cdiv(IMAGES, BLOCK_B) * blocks_h * blocks_w
    # A block of neurons lies within one group.
    blocks_in_group = tl.cdiv(GROUP, BLOCK_N)
    blocks_n = blocks_in_group * (N // GROUP)
    for tile in tl.range(tl.program_id(0), blocks_p * blocks_n, PROGRAMS, flatten=True):
        # Programs that run together share rows and columns, so that the L2 cache serves them.
        first = tile // (GROUP_P * blocks_n) * GROUP_P
        rows = min(blocks_p - first, GROUP_P)
        within = tile % (GROUP_P * blocks_n)
        block_p, block_n = first + within % rows, within // rows
        group, in_group = block_n // blocks_in_group, block_n % blocks_in_group * BLOCK_N
        image = block_p // (blocks_h * blocks_w) * BLOCK_B
        top = block_p // blocks_w % blocks_h * BLOCK_H
        left = block_p % blocks_w * BLOCK_W

        product = tl.zeros((BLOCK_P, ROLES * BLOCK_N), tl.float32)
        for k in range(0, TAPS_H * TAPS_W * STEPS):
            tap, channel = k // STEPS, k % STEPS * BLOCK_K
            # Rows and columns of the input, as whole steps of the stride and a rest. Multiples of
            # the stride, taken off again, keep both from being negative.
            down = tap // TAPS_W * DILATION_H + (STRIDE_H - 1) * PAD_H
            along = tap % TAPS_W * DILATION_W + (STRIDE_W - 1) * PAD_W
            box = x.load(
                [
                    image,
                    top + down // STRIDE_H - PAD_H,
                    down % STRIDE_H,
                    left + along // STRIDE_W - PAD_W,
                    (along % STRIDE_W * (N // GROUP) + group) * CHANNELS + channel,
                ]
            )
            product = tl.dot(
                tl.reshape(box, (BLOCK_P, BLOCK_K)),
                weights.load([(group * GROUP + in_group) * ROLES, tap * CHANNELS + channel]).T,
                product,
                input_precision=PRECISION,
            )
        roles = apart(product, ROLES, BLOCK_P, BLOCK_N)
        in_block = tl.arange(0, BLOCK_N)
        n, mask_n = group * GROUP + in_group + in_block, in_group + in_block < GROUP
        z = ()
        for d in tl.static_range(D):
            z = z + (roles[d + (MODE == "neuron")],)
        a = cascade(z, bias, to_dendrite, n, mask_n, N, D, HAS_BIAS, ACTIVATION, FAST, 1)
        # From the first element of the tile on, 32 bits are enough.
        corner = image.to(tl.int64) * out_b + (top * WIDTH + left).to(tl.int64) * out_s
        corner += (group * GROUP + in_group).to(tl.int64) * out_n
        q = tl.arange(0, BLOCK_P)
        b, h, w = q // (BLOCK_H * BLOCK_W), q // BLOCK_W % BLOCK_H, q % BLOCK_W
        mask_p = (image + b < IMAGES) & (top + h < HEIGHT) & (left + w < WIDTH)
        at = (b * out_b + (h * WIDTH + w) * out_s)[:, None] + (in_block * out_n)[None, :]
        mask = mask_p[:, None] & mask_n[None, :]
        if MODE == "neuron":
            s = roles[0]
            if HAS_SOMA_BIAS:
                s += link(soma_bias, n, mask_n, 1)
        else:
            s = tl.load(soma + corner + at, mask=mask, other=0.0).to(tl.float32)
        if MODE == "gradient":
            share = out + block_p.to(tl.int64) * D * N + n
            for d in tl.static_range(D):
                # Rows past the end have an error of zero.
                tl.store(share + d * N, tl.sum(s * a[d], axis=0), mask=mask_n)
        else:
            s -= negated_sum(a, to_soma, n, mask_n, N, D, 1)
            tl.store(out + corner + at, s.to(out.dtype.element_ty), mask=mask)
        if KEEP:
            kept += corner
            for d in tl.static_range(D):
                tl.store(kept + at, a[d].to(kept.dtype.element_ty), mask=mask)
                kept += kept_d
            kept -= corner + D * kept_d


@dataclass(frozen=True, slots=True)
class Input:
    """What is walked: NHWC, and how.

    Attributes:
        x: `(B, H, W, channels)` contiguous.
        geometry: over two dimensions, not transposed; its strides divide H and W.
        kernel: taps, `(kH, kW)`.
    """

    x: Tensor
    geometry: Geometry
    kernel: tuple[int, int]

    @property
    def channels(self) -> int:
        """Channels of one group."""
        return self.x.shape[3] // self.geometry.groups

    def described(self, box: tuple[int, int, int], channels: int) -> Any:
        """Describe boxes of images, rows, columns and channels, a stride's steps apart.

        The axes are the image, the row in whole strides and the rest, the column in whole strides,
        and the rest of it with the channels.
        """
        images, height, width, deep = self.x.shape
        down, along = self.geometry.stride
        return boxes(
            self.x,
            (images, height // down, down, width // along, along * deep),
            (height * width * deep, down * width * deep, width * deep, along * deep, 1),
            (box[0], box[1], 1, box[2], channels),
        )


def fused_conv_neuron(
    given: Input,
    weights: Tensor,
    soma: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    sizes: tuple[int, int, int],
    out: Tensor,
    kept: Tensor | None,
    blocks: Blocks | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        given: the input, not empty, whose channels, and those of a group, fill 16 bytes; float16,
            bfloat16, or float32 for TF32 products.
        weights: W and V, `interleave`d, the dtype of the input; V alone where `soma` is given.
        soma: b, `(N,)`, any float dtype, or None; or the soma's output, in shape, dtype and strides
            as `out`.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, D from 1 to 7, any float dtype.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        sizes: images, rows and columns of output positions; their product is what counts where
            there is one tap.
        out: `(B, N, H', W')`, contiguous or in channels_last; written.
        kept: `(D, *out)`, each slice with the strides of `out`; written.
        blocks: the configuration, by default `conv_neuron_blocks`'.
    """
    mode = "neuron" if soma is None or soma.dim() == 1 else "add"
    tiling = Tiling.of(given, len(to_soma), out, sizes, mode == "neuron", blocks)
    links = bias, to_soma, to_dendrite, activation
    _launch(given, weights, soma, *links, tiling, out, kept, out, mode)


def conv_dendrites_gradient(
    given: Input,
    weights: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    sizes: tuple[int, int, int],
    blocks: Blocks | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        given: as in `fused_conv_neuron`, and likewise the others.
        weights: V, `interleave`d.
        grad: g, `(B, N, H', W')`, contiguous or in channels_last, dtype of the input.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        sizes: of output positions.
        blocks: the configuration, by default `conv_neuron_blocks`'.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    dendrites, neurons = to_dendrite.shape[1:]
    tiling = Tiling.of(given, dendrites, grad, sizes, False, blocks)
    partial = grad.new_empty((tiling.boxes, dendrites, neurons), dtype=torch.float32)
    # Links to the soma are not read in this mode.
    links = bias, to_dendrite, to_dendrite, activation
    _launch(given, weights, grad, *links, tiling, partial, None, grad, "gradient")
    return added(partial)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How output positions and neurons are cut up: a configuration, a box, and how many there are.

    Attributes:
        blocks: the configuration.
        sizes: images, rows and columns.
        box: of one tile, likewise.
    """

    blocks: Blocks
    sizes: tuple[int, int, int]
    box: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        given: Input,
        dendrites: int,
        out: Tensor,
        sizes: tuple[int, int, int],
        soma: bool,
        blocks: Blocks | None,
    ) -> Tiling:
        """Choose what is not given."""
        geometry, neurons = given.geometry, out.shape[1]
        blocks = blocks or conv_neuron_blocks(
            math.prod(sizes),
            neurons // geometry.groups,
            given.channels,
            dendrites,
            given.x.element_size(),
            whole=geometry.groups == 1 and geometry.stride[1] == 1,
            soma=soma,
        )
        # Within a tile, the kernel counts elements in 32 bits.
        near = out.shape[1:].numel() * blocks.positions < 2**31
        images, *places = sizes
        return cls(blocks, sizes, box_of(blocks.positions, images if near else 1, *places))

    @property
    def boxes(self) -> int:
        """Tiles of positions."""
        return math.prod(ceiling(n, each) for n, each in zip(self.sizes, self.box, strict=True))


def _launch(
    given: Input,
    weights: Tensor,
    soma: Tensor | None,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    tiling: Tiling,
    out: Tensor,
    kept: Tensor | None,
    like: Tensor,
    mode: str,
) -> None:
    """Launch the kernel; `like` has the shape and the strides of the soma."""
    dendrites, neurons = to_dendrite.shape[1:]
    geometry, blocks, box = given.geometry, tiling.blocks, tiling.box
    group, places = neurons // geometry.groups, like.shape[2] * like.shape[3]
    roles = roles_of(dendrites, mode == "neuron")
    tiles = tiling.boxes * ceiling(group, blocks.neurons) * geometry.groups
    programs = min(tiles, multiprocessors(out) * blocks.resident)
    rows = like.stride(1) == 1
    with on_device(out):
        _conv_neuron_kernel[(programs,)](
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            out if soma is None else soma,
            given.described(box, blocks.inputs),
            boxes(
                weights, weights.shape, weights.stride(), (roles * blocks.neurons, blocks.inputs)
            ),
            out if soma is None else soma,
            to_soma if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            *tiling.sizes,
            neurons,
            group,
            0 if kept is None else kept.stride(0),
            places * neurons,
            neurons if rows else 1,
            1 if rows else places,
            CHANNELS=given.channels,
            STRIDE_H=geometry.stride[0],
            STRIDE_W=geometry.stride[1],
            PAD_H=geometry.padding[0],
            PAD_W=geometry.padding[1],
            DILATION_H=geometry.dilation[0],
            DILATION_W=geometry.dilation[1],
            TAPS_H=given.kernel[0],
            TAPS_W=given.kernel[1],
            D=dendrites,
            ROLES=roles,
            MODE=mode,
            KEEP=kept is not None,
            ACTIVATION=activation,
            FAST=fast_activations(like),
            HAS_SOMA_BIAS=mode == "neuron" and soma is not None,
            HAS_BIAS=bias is not None,
            PRECISION="tf32",
            BLOCK_B=box[0],
            BLOCK_H=box[1],
            BLOCK_W=box[2],
            BLOCK_N=blocks.neurons,
            BLOCK_K=blocks.inputs,
            GROUP_P=8,
            PROGRAMS=programs,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
