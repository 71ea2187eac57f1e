"""`pbfx::perforated_linear`: a linear op with its dendrites as one node, soma included.

    out, a = W x + b + Σ_d T_d ⊙ a_d, (D, *out)

A graph holds it where the *fused* strategy may compute it: soma and dendrites from one read of the
input. Its backward is perforated as that of `pbfx::dendrites`: the error reaches the soma's
parameters, its input and the links T. It is written in plain ops and `pbfx::dendrites_backward`,
which AOTAutograd hands on to inductor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pbfx_kernels.ops  # noqa: F401  registers the ops that a backward runs
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.dispatch import evaluate_dendrites
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.fused_configs import Blocks
from pbfx_kernels.geometry import LINEAR
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import Problem, can_fuse, linear_problem
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites
from pbfx_kernels.ways import fastest_way, neuron_ways


@op("perforated_linear")
def perforated_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Match `reference.dendrites` over `F.linear(x, weight, bias)`.

    Args:
        x: `(..., K)`; its dtype is that of the computation.
        weight: W, `(N, K)`, the dtype of `x`.
        bias: b, `(N,)`, or None, likewise.
        dendrite_weight: V, `(D, N, K)`, any float dtype, as all that follow.
        dendrite_bias: c, `(D, N)`, or None.
        to_soma: T, `(D, N)`.
        to_dendrite: U, `(D, D, N)`, strictly lower triangle.
        activation: f, one of `ACTIVATIONS`.
        keep: whether to return the activations, else `(0, *out)`.

    Raises:
        ArgumentError: the dendrites do not fit the soma (see `dendrites`).
    """
    tensors = x, weight, bias, dendrite_weight, dendrite_bias, to_soma, to_dendrite
    return _evaluated(tensors, activation, keep, float32_precision(x))


def _evaluate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    keep: bool,
    _: object,
) -> tuple[Tensor, Tensor]:
    links = dendrite_bias, to_soma, to_dendrite, activation
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    check_dendrites(out, x, dendrite_weight, *links, LINEAR)

    def library() -> tuple[Tensor, Tensor]:
        with no_autocast(x):
            soma = F.linear(x, weight, bias)
            found = evaluate_dendrites(soma, x, dendrite_weight, *links, LINEAR, keep)
        return found[0].contiguous(), found[1].contiguous()

    if not (x.numel() and can_fuse(x, weight, dendrite_weight)):
        return library()
    problem = linear_problem(x, weight, dendrite_weight)
    assert problem is not None, "it can be fused"
    return or_reference(
        problem,
        lambda: _fused(problem, x, weight, bias, dendrite_weight, *links, keep, out),
        library,
    )


_evaluated = Taped(_evaluate)


def _fused(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    keep: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    from pbfx_kernels.fused_neuron import can_describe, fused_neuron, interleave

    activations = x.new_empty((problem.dendrites if keep else 0, *out.shape))
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if can_describe(rows) else rows.clone(memory_format=torch.contiguous_format)
    weights, links = interleave(weight, dendrite_weight), (dendrite_bias, to_soma, to_dendrite)
    flat = activations.view(problem.dendrites, -1, problem.neurons) if keep else None

    def run(blocks: Blocks | None) -> None:
        written = out.view(-1, problem.neurons)
        fused_neuron(rows, weights, bias, *links, activation, written, flat, blocks)

    ways = neuron_ways(problem)
    run(fastest_way("neuron", x, problem, activation, keep, ways, None, run))
    return out, activations


@perforated_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dendrite_weight: Tensor,
    dendrite_bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    check_dendrites(
        out, x, dendrite_weight, dendrite_bias, to_soma, to_dendrite, activation, LINEAR
    )
    return out, x.new_empty((dendrite_weight.shape[0] if keep else 0, *out.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, _, to_soma, *_, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    learns = to_soma.requires_grad
    if learns and not keep:
        raise RuntimeError(
            "pbfx::perforated_linear: to_soma requires a gradient, which needs the activations; "
            "call it with keep=True"
        )
    ctx.save_for_backward(
        x if weight.requires_grad else None,
        weight if x.requires_grad else None,
        output[1] if learns else None,
    )
    ctx.has_bias, ctx.to_soma_dtype = bias is not None and bias.requires_grad, to_soma.dtype


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, weight, activations = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    grad_x = None if weight is None else grad.matmul(weight)
    grad_weight = None if x is None else rows.T.mm(x.reshape(-1, x.shape[-1]))
    grad_bias = rows.sum(0) if ctx.has_bias else None
    grad_to_soma = None
    if activations is not None:
        grad_to_soma = torch.ops.pbfx.dendrites_backward.default(grad, activations, -1)
        grad_to_soma = grad_to_soma.to(ctx.to_soma_dtype)
    return grad_x, grad_weight, grad_bias, None, None, grad_to_soma, None, None, None


perforated_linear_op.register_autograd(_gradients, setup_context=_setup)
