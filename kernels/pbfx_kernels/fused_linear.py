"""The *split* strategy for linear ops: all dendrites in one kernel that adds to a given soma.

    z_d = V_d x        a_d = f(z_d + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)        out = soma + Σ_d T_d ⊙ a_d

Shapes: P positions, K inputs, N neurons, D dendrites. One program computes a tile of positions by
neurons for all D at once: a tile of `x` is loaded once for D products, whose accumulators are the
preactivations in float32; no preactivation is ever in memory.

The same main loop gives `dT_d = Σ_p g ⊙ a_d` with the activations recomputed, so that nothing but
the soma's own input has to be saved for the backward.

Source: Brenner and Itti, *Perforated Backpropagation*, arXiv 2501.18018.
"""

# The type checker does not know what Triton adds to Python: launch options, static_range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from pbfx_kernels.fused_configs import Blocks, linear_blocks
from pbfx_kernels.launching import ceiling, fast_activations, on_device
from pbfx_kernels.layout import grid_of, regular
from pbfx_kernels.relaunch import relaunched
from pbfx_kernels.shares import added
from pbfx_kernels.triton_math import finish, zeros


@relaunched
def _linear_dendrites_kernel(
    out,
    kept,
    soma,
    x,
    weight,
    bias,
    to_soma,
    to_dendrite,
    P,
    N,
    K,
    kept_d,
    out_p,
    out_n,
    soma_p,
    soma_n,
    x_p,
    x_k,
    D: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    # Programs that run together share rows and columns, so that the L2 cache serves them.
    blocks_p, blocks_n = tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP_P * blocks_n) * GROUP_P
    rows = min(blocks_p - first, GROUP_P)
    within = pid % (GROUP_P * blocks_n)
    block_p, block_n = first + within % rows, within // rows

    p = block_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask_p, mask_n = p < P, n < N
    # Rows and columns past the end read the first one instead, which needs no mask.
    x += tl.where(mask_p, p, 0)[:, None] * x_p + k[None, :].to(tl.int64) * x_k
    weight += tl.where(mask_n, n, 0).to(tl.int64)[None, :] * K + k[:, None]
    next_d = tl.cast(N, tl.int64) * K
    z = zeros(D, BLOCK_P, BLOCK_N)
    for k_0 in range(0, K, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x)
        else:
            x_tile = tl.load(x, mask=k[None, :] < K - k_0, other=0.0)
        added = ()
        for d in tl.static_range(D):
            if EVEN_K:
                v_tile = tl.load(weight + d * next_d)
            else:
                v_tile = tl.load(weight + d * next_d, mask=k[:, None] < K - k_0, other=0.0)
            added = added + (tl.dot(x_tile, v_tile, z[d], input_precision=PRECISION),)
        z = added
        x += BLOCK_K * x_k
        weight += BLOCK_K
    wide_n = n.to(tl.int64)[None, :]
    finish(
        z,
        out,
        kept,
        soma,
        bias,
        to_soma,
        to_dendrite,
        p[:, None] * out_p + wide_n * out_n,
        p[:, None] * soma_p + wide_n * soma_n,
        kept_d,
        block_p,
        n,
        mask_n,
        mask_p[:, None] & mask_n[None, :],
        N,
        D,
        MODE,
        HAS_BIAS,
        ACTIVATION,
        FAST,
    )


def fused_linear(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    out: Tensor,
    kept: Tensor | None,
    blocks: Blocks | None = None,
) -> None:
    """Write the neuron's output, and the activations if `kept` is given.

    Args:
        soma: `(..., N)`, any strides, not empty; float16, bfloat16, or float32 for TF32 products.
        x: `(..., K)`, K at least 1; cast to the dtype of `soma`.
        weight: V, `(D, N, K)`, 1 <= D <= `fused_configs.MOST_DENDRITES`; likewise.
        bias: c, `(D, N)`, any float dtype, or None.
        to_soma: T, `(D, N)`, likewise.
        to_dendrite: U, `(D, D, N)`, likewise.
        activation: f, one of `ACTIVATIONS`.
        out: `(..., N)`, `layout.is_regular`; written.
        kept: `(D, *soma)`, each slice with the strides of `out`; written.
        blocks: the configuration, by default `linear_blocks`'.
    """
    mode = "add" if kept is None else "keep"
    _launch(soma, x, weight, bias, to_soma, to_dendrite, activation, out, kept, mode, blocks)


def fused_linear_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_dendrite: Tensor,
    activation: str,
    blocks: Blocks | None = None,
) -> Tensor:
    """Sum `dT_d = Σ_p g ⊙ a_d`, recomputing the activations.

    Args:
        grad: g, `(..., N)`, any strides, not empty; its dtype is that of the computation.
        x: as in `fused_linear`, and likewise the others.
        weight: V, `(D, N, K)`.
        bias: c, `(D, N)`, or None.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.
        blocks: the configuration, by default `linear_blocks`'.

    Returns:
        `(D, N)`, float32, the same bits in every run.
    """
    dendrites, neurons, inputs = weight.shape
    positions = grad.numel() // neurons
    blocks = blocks or linear_blocks(positions, neurons, inputs, dendrites, grad.element_size())
    shares = ceiling(positions, blocks.positions)
    partial = grad.new_empty((shares, dendrites, neurons), dtype=torch.float32)
    links = to_dendrite
    _launch(
        grad, x, weight, bias, links, to_dendrite, activation, partial, None, "gradient", blocks
    )
    return added(partial)


def _launch(
    soma: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    out: Tensor,
    kept: Tensor | None,
    mode: str,
    blocks: Blocks | None,
) -> None:
    x, weight = regular(x.to(soma.dtype), -1), weight.to(soma.dtype).contiguous()
    soma = regular(soma, -1)
    dendrites, neurons, inputs = weight.shape
    (soma_p, _, soma_n), *_ = grid_of(-1, soma).strides
    (x_p, _, x_k), *_ = grid_of(-1, x).strides
    (out_p, _, out_n), *_ = grid_of(-1, soma if mode == "gradient" else out).strides
    positions = soma.numel() // neurons
    blocks = blocks or linear_blocks(positions, neurons, inputs, dendrites, soma.element_size())
    with on_device(soma):
        _linear_dendrites_kernel[
            (ceiling(positions, blocks.positions) * ceiling(neurons, blocks.neurons),)
        ](
            out,
            # A pointer has to be one, whether it is read or not.
            out if kept is None else kept,
            soma,
            x,
            weight,
            soma if bias is None else bias.contiguous(),
            to_soma.contiguous(),
            to_dendrite.contiguous(),
            positions,
            neurons,
            inputs,
            0 if kept is None else kept.stride(0),
            out_p,
            out_n,
            soma_p,
            soma_n,
            x_p,
            x_k,
            D=dendrites,
            MODE=mode,
            ACTIVATION=activation,
            FAST=fast_activations(soma),
            HAS_BIAS=bias is not None,
            EVEN_K=inputs % blocks.inputs == 0,
            PRECISION="tf32",
            BLOCK_P=blocks.positions,
            BLOCK_N=blocks.neurons,
            BLOCK_K=blocks.inputs,
            GROUP_P=8,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
