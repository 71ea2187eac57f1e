"""Linear neurons for inference, from weights that lie side by side for good.

    out = W x + b + Σ_d T_d ⊙ a_d        a_d = f(V_d x + c_d + Σ_{e<d} U_{d,e} ⊙ a_e)

It is the *fused* kernel, without what `pbfx::perforated_linear` does at every call: laying the
weights out. A graph that `torch.compile` makes holds the op `pbfx::frozen_neurons`. In what
`torch.export` writes, where gradients are wanted, and on every device that has no such kernel, it
is plain torch over the same rows.

Shapes: P positions, K inputs, N neurons, D dendrites; R roles, 1 + D rounded up to a power of two,
and M, N rounded up to a multiple of four.
"""

import torch
from torch import Tensor

from pbfx_kernels import reference
from pbfx_kernels.candidate_autograd import autocasts, no_autocast
from pbfx_kernels.fallback import or_reference
from pbfx_kernels.geometry import LINEAR
from pbfx_kernels.launching import ceiling, power_of_two
from pbfx_kernels.problem import linear_problem
from pbfx_kernels.registering import op
from pbfx_kernels.strategy import fuses_frozen
from pbfx_kernels.tape import Taped, float32_precision

# Neurons whose rows take turns; see `fused_neuron`.
_QUAD = 4


def wins(stacked: Tensor) -> bool:
    """Return whether neurons of these weights had better lie side by side, on their device.

    Args:
        stacked: `[W; V_1; ...; V_D]`, `(1 + D, N, K)`.
    """
    problem = linear_problem(stacked, stacked, stacked[1:])
    return problem is not None and fuses_frozen(problem)


def lay(stacked: Tensor) -> Tensor:
    """Lay the weights of each neuron side by side, as the *fused* kernel reads them.

    Args:
        stacked: `[W; V_1; ...; V_D]`, `(1 + D, N, K)`, D at least 1.

    Returns:
        `(R * M, K)`, contiguous: of four neurons the soma and the first dendrite in turns, then
        their next two dendrites, and so on; what does not exist is zeros.
    """
    count, each, inputs = stacked.shape
    quads = ceiling(each, _QUAD)
    rows = stacked.new_zeros(power_of_two(count), quads * _QUAD, inputs)
    rows[:count, :each] = stacked
    return rows.view(-1, 2, quads, _QUAD, inputs).permute(2, 0, 3, 1, 4).reshape(-1, inputs)


def take_apart(rows: Tensor, dim: int, stacked: int, neurons: int) -> list[Tensor]:
    """Undo `lay` on an axis of weights, or of their product: 1 + D tensors of N neurons.

    Args:
        rows: with R * M of them along `dim`.
        dim: negative.
        stacked: 1 + D.
        neurons: N.
    """
    quads = ceiling(neurons, _QUAD)
    split = rows.unflatten(dim, (quads, -1, _QUAD, 2))
    return [
        split.select(dim, role % 2)
        .select(dim - 1, role // 2)
        .flatten(dim - 1, dim)
        .narrow(dim, 0, neurons)
        for role in range(stacked)
    ]


def frozen_neurons(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    """Evaluate linear somas with their dendrites.

    Args:
        x: `(..., K)`.
        weights: of `lay`, `(R * M, K)`.
        bias: `[b; c_1; ...; c_D]`, `((1 + D) * N,)`, or None.
        to_soma: T, `(D, N)`, D at least 1.
        to_dendrite: U, `(D, D, N)`.
        activation: f, one of `ACTIVATIONS`.

    Returns:
        `(..., N)`, in the dtype of the soma's own op.
    """
    links = weights, bias, to_soma, to_dendrite, activation
    if not _may_run_kernel(x, weights):
        return _plain(x, *links)
    if torch.compiler.is_compiling():
        return torch.ops.pbfx.frozen_neurons.default(x, *links)
    return _evaluated((x, *links[:4]), activation, float32_precision(x))


@op("frozen_neurons")
def frozen_neurons_op(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    """Evaluate linear somas with their dendrites, without gradients.

    Args:
        x: `(..., K)`, the dtype of `weights`, which is that of the computation.
        weights: as in `frozen_neurons`, and likewise the others.
        bias: or None.
        to_soma: T.
        to_dendrite: U.
        activation: f.
    """
    tensors = x, weights, bias, to_soma, to_dendrite
    with no_autocast(x):
        return _evaluated(tensors, activation, float32_precision(x)).contiguous()


@frozen_neurons_op.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], to_soma.shape[1]))


def _may_run_kernel(x: Tensor, weights: Tensor) -> bool:
    """Return whether this call may be a launch, if the device has the kernel."""
    if not _on_gpu(x) or x.dtype != weights.dtype or autocasts(x.device.type):
        return False
    if torch.compiler.is_compiling():
        # An exported graph runs where nobody knows the op. Dynamo of torch 2.11 holds
        # `torch.compiler.is_exporting()` to be true of every graph, so the flag itself is read.
        if torch.compiler._is_exporting_flag:
            return False
    elif torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad))


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _evaluate(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
    _: object,
) -> Tensor:
    links = weights, bias, to_soma, to_dendrite, activation
    count, each = to_soma.shape
    form = torch.empty((count, each, x.shape[-1]), device="meta")
    problem = linear_problem(x, weights, form)
    if not x.numel() or problem is None or not fuses_frozen(problem):
        return _plain(x, *links)
    return or_reference(problem, lambda: _launch(x, *links), lambda: _plain(x, *links))


_evaluated = Taped(_evaluate)


def _launch(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    from pbfx_kernels.fused_neuron import can_describe, fused_neuron

    count, each = to_soma.shape
    out = x.new_empty((*x.shape[:-1], each))
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if can_describe(rows) else rows.clone(memory_format=torch.contiguous_format)
    own, theirs = (None, None) if bias is None else (bias[:each], bias[each:].view(count, each))
    fused_neuron(
        rows, weights, own, theirs, to_soma, to_dendrite, activation, out.view(-1, each), None
    )
    return out


def _plain(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    to_soma: Tensor,
    to_dendrite: Tensor,
    activation: str,
) -> Tensor:
    count, each = to_soma.shape
    product = reference.product(x, weights, None, LINEAR)
    wide = reference.accumulation_dtype(product.dtype)
    soma, *z = [role.to(wide) for role in take_apart(product, -1, 1 + count, each)]
    if bias is not None:
        own, *theirs = bias.to(wide).unflatten(0, (1 + count, each)).unbind()
        soma, z = soma + own, [role + offset for role, offset in zip(z, theirs, strict=True)]
    out = reference.join(soma, z, to_soma, to_dendrite, activation, LINEAR)[0]
    return out.to(product.dtype)
