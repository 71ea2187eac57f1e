"""The gradient of an op, stated once: for graphs, which hold it, and for eager code.

    evaluate(*inputs) -> outputs                        the first has a gradient, the rest have none
    remember(ctx, inputs, outputs, learns)              saves what the gradient is made from
    differentiate(ctx, grad, by_ops) -> gradients       of the first inputs; the rest have none

Eager code needs no node in a graph, so there an `autograd.Function` does the work of the op, and
Python crosses the dispatcher four times less per site and step, which is most of what a small batch
costs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pbfx_kernels.registering import Op

Inputs = tuple[Any, ...]
Gradients = tuple[Tensor | None, ...]
Evaluate = Callable[..., tuple[Tensor, ...]]
Remember = Callable[[Any, Inputs, Any, Sequence[bool]], None]
# Of a context of `remember`, the error at the first output, and whether what is computed has to be
# ops, which graphs can hold and which say that they have no derivative, or may be plain calls.
Differentiate = Callable[[Any, Tensor | None, bool], Gradients]


def in_graphs(
    op: Op,
    remember: Remember,
    differentiate: Differentiate,
    site: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> None:
    """Give an op its gradient.

    Args:
        op: with tensors first among its inputs, all those that learn.
        remember: see above; `learns` says which of the inputs want a gradient.
        differentiate: likewise.
        site: from the inputs of the op to those of `evaluate`, which begin with the same tensors.
    """

    def setup(ctx: Any, inputs: Inputs, output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        learns = [isinstance(given, Tensor) and given.requires_grad for given in inputs]
        remember(ctx, site(inputs), output, learns)

    def gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Gradients:
        return _padded(ctx, differentiate(ctx, grad, True))

    op.register_autograd(gradients, setup_context=setup)


def in_eager_mode(
    name: str, evaluate: Evaluate, remember: Remember, differentiate: Differentiate
) -> Callable[..., Any]:
    """Return what does the work of an op, where `candidate_autograd.runs_eagerly` only.

    Args:
        name: of the node in autograd's graph.
        evaluate: see above; it checks what it is given.
        remember: likewise.
        differentiate: likewise.
    """

    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = evaluate(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        remember(ctx, inputs, outputs, ctx.needs_input_grad)
        return outputs

    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> Gradients:
        # Under `create_graph`, an op says that it has no derivative; a kernel would not.
        return _padded(ctx, differentiate(ctx, grad, torch.is_grad_enabled()))

    static = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node_type: Any = type(name, (torch.autograd.Function,), static)
    # The C++ half of `Function.apply`; the Python half looks for function transforms once more.
    node: Any = super(torch.autograd.Function, node_type).apply  # pyright: ignore[reportAttributeAccessIssue]

    def apply(*inputs: Any) -> Any:
        run = node if torch.is_grad_enabled() else evaluate
        return run(*inputs)

    return apply


def _padded(ctx: Any, gradients: Gradients) -> Gradients:
    return (*gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients)))
