"""`pbfx::perforated_linear`: a linear op with its dendrites as one node, soma included.

    out, a = W x + b + Σ_d T_d ⊙ a_d, (D, *out)

A graph holds it where the *fused* or the *streamed* strategy may compute it: soma and dendrites in
one kernel. Its backward is perforated as that of `pbfx::dendrites`: the error reaches the soma's
parameters, its input and the links T. It is written in plain ops, `pbfx::dendrites_backward` and
`pbfx::link_and_bias_gradients`, which AOTAutograd hands on to inductor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import pbfx_kernels.ops  # noqa: F401  registers the ops that a backward runs
from pbfx_kernels.candidate_autograd import no_autocast
from pbfx_kernels.dispatch import evaluate_dendrites, sum_links_and_bias
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.fused_configs import Blocks, Streams
from pbfx_kernels.geometry import LINEAR
from pbfx_kernels.problem import Problem, linear_problem
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import can_fuse, streams
from pbfx_kernels.tape import Taped, float32_precision
from pbfx_kernels.validation import check_dendrites
from pbfx_kernels.ways import fastest_way, neuron_ways


def evaluate(
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


perforated_linear_op = op("perforated_linear")(evaluate)


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

    problem = linear_problem(x, weight, dendrite_weight) if x.numel() else None
    if problem is None or not (streams(problem) or can_fuse(x, weight, dendrite_weight)):
        return library()
    return or_reference(
        problem,
        lambda: _in_one_kernel(problem, x, weight, bias, dendrite_weight, *links, keep, out),
        library,
    )


_evaluated = Taped(_evaluate)


def _in_one_kernel(
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
    activations = x.new_empty((problem.dendrites if keep else 0, *out.shape))
    flat = activations.view(problem.dendrites, -1, problem.neurons) if keep else None
    rows, streamed = x.reshape(-1, x.shape[-1]), streams(problem)
    written = out.view(-1, problem.neurons)
    links = bias, dendrite_bias, to_soma, to_dendrite, activation, written, flat

    def run(way: Blocks | Streams | None) -> None:
        if isinstance(way, Streams) or (way is None and streamed):
            from pbfx_kernels.streamed_neuron import streamed_neuron

            streamed_neuron(rows, weight, dendrite_weight, *links, way)
        else:
            from pbfx_kernels.fused_neuron import can_describe, fused_neuron, interleave

            whole = torch.contiguous_format
            described = rows if can_describe(rows) else rows.clone(memory_format=whole)
            fused_neuron(described, interleave(weight, dendrite_weight), *links, way)

    run(fastest_way("neuron", x, problem, activation, keep, neuron_ways(problem), None, run))
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


def remember(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],
    learns: Sequence[bool],
) -> None:
    """Save what `differentiate` needs; `learns` says which of the inputs want a gradient."""
    x, weight, bias, _, _, to_soma, *_, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    if learns[5] and not keep:
        raise RuntimeError(
            "pbfx::perforated_linear: to_soma requires a gradient, which needs the activations; "
            "call it with keep=True"
        )
    ctx.save_for_backward(
        x if learns[1] else None, weight if learns[0] else None, output[1] if learns[5] else None
    )
    ctx.has_bias, ctx.to_soma_dtype = bias is not None and learns[2], to_soma.dtype


def differentiate(ctx: Any, grad: Tensor | None, by_ops: bool) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input.

    Args:
        ctx: of `remember`.
        grad: of the output.
        by_ops: whether the sums are ops, which a graph can hold, or calls.
    """
    x, weight, activations = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    rows = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
    grad_x = None if weight is None else grad.matmul(weight)
    grad_weight = None if x is None else rows.T.mm(x.reshape(-1, x.shape[-1]))
    grad_bias = grad_to_soma = None
    ops, links = torch.ops.pbfx, ctx.to_soma_dtype
    if activations is not None and ctx.has_bias:
        both = ops.link_and_bias_gradients.default if by_ops else sums_of_links_and_bias
        grad_to_soma, grad_bias = both(grad, activations, links, grad.dtype)
    elif activations is not None:
        grad_to_soma = ops.dendrites_backward.default(grad, activations, -1).to(links)
    elif ctx.has_bias:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, None, None, grad_to_soma, None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    learns = [isinstance(given, Tensor) and given.requires_grad for given in inputs]
    remember(ctx, inputs, output, learns)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate(ctx, grad, True)


perforated_linear_op.register_autograd(_gradients, setup_context=_setup)


def sums_of_links_and_bias(
    grad: Tensor, activations: Tensor, links: torch.dtype, bias: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum `dT_d = Σ_p g ⊙ a_d` and `db = Σ_p g` of a linear op, from one read of the error.

    Args:
        grad: g, `(..., N)`.
        activations: a, `(D, *grad)`.
        links: dtype of dT.
        bias: dtype of db.

    Returns:
        `(D, N)` and `(N,)`.
    """
    return _summed((grad, activations), links, bias)


def _sum(
    grad: Tensor, activations: Tensor, links: torch.dtype, bias: torch.dtype
) -> tuple[Tensor, Tensor]:
    with no_autocast(grad):
        return sum_links_and_bias(grad, activations, links, bias)


_summed = Taped(_sum)
link_and_bias_gradients_op = op("link_and_bias_gradients")(sums_of_links_and_bias)


@link_and_bias_gradients_op.register_fake
def _(
    grad: Tensor, activations: Tensor, links: torch.dtype, bias: torch.dtype
) -> tuple[Tensor, Tensor]:
    each = grad.shape[-1]
    return (
        grad.new_empty((activations.shape[0], each), dtype=links),
        grad.new_empty(each, dtype=bias),
    )
