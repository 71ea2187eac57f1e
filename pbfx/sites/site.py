"""What is known about one site: names, form, and how its weight is laid out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from pbfx_kernels import LINEAR, Geometry


@dataclasses.dataclass(frozen=True)
class Padding:
    """What is added around the input before the op: `F.pad`'s widths (last axis first), mode."""

    widths: tuple[int, ...]
    mode: str


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which neurons of an op have dendrites, in increasing order, where not all of them do.

    Attributes:
        channels: the neurons, as channels of the op's output.
        inputs: of a convolution in groups the input channels of their groups, None for all.
    """

    channels: tuple[int, ...]
    inputs: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """One place that can carry dendrites.

    Paths are relative to the module that the graph runs over.

    Attributes:
        name: path of the linear or conv module that owns the weight, "" for the graph's root; of
            the parameter itself where it is no such module's `weight`.
        op: linear, conv1d, conv2d, conv3d, or a conv_transpose of these.
        weight: path of the soma's weight as its owner's attribute, which may be computed.
        home: path of the parameter that this weight is or is computed from: whose dtype, device
            and optimizer group the dendrites share.
        shape: of the weight W.
        bias: path of the soma's bias where it is a parameter, or None.
        biased: whether the dendrites have a bias: where the soma has one, and before every norm.
        dendrites: path at which the site's dendrites live.
        geometry: stride, padding, dilation, groups, transposed, output padding.
        padding: what has to be padded before the op, for padding modes that the op does not know.
        input_first: whether a linear weight is stored (K, N), as `x @ W` takes it.
        norm: the kind of norm after which the dendrites join, None for the op's own output.
        calls: how often the graph calls the op.
        subset: the neurons that this is about, None for all. `shape` and `geometry` are then
            those of an op that has no others.
    """

    name: str
    op: str
    weight: str
    home: str
    shape: tuple[int, ...]
    bias: str | None
    biased: bool
    dendrites: str
    geometry: Geometry = LINEAR
    padding: Padding | None = None
    input_first: bool = False
    norm: str | None = None
    calls: int = 1
    subset: Subset | None = None

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The channels of the op's output that are meant, None for all."""
        return None if self.subset is None else self.subset.channels

    @property
    def op_shape(self) -> tuple[int, ...]:
        """Shape of W as the kernels take it."""
        return self.shape[::-1] if self.input_first else self.shape

    @property
    def neurons(self) -> int:
        """N, the number of neurons."""
        return self.geometry.neurons(self.op_shape)

    @property
    def fan_in(self) -> float:
        """How many inputs a neuron reads at one position, on average, 1 at least.

        A transposed convolution of stride s hands each output position the s-th part of its taps.
        """
        inputs = self.geometry.channels(self.op_shape) // self.geometry.groups
        taps = math.prod(self.op_shape[2:])
        skipped = math.prod(self.geometry.stride) if self.geometry.transposed else 1
        return max(inputs * taps / skipped, 1.0)

    def dendrite_parameters(self, dendrites: int) -> int:
        """Return how many parameters one more dendrite per neuron adds to so many.

        Its link to its neuron and those from the older dendrites are parameters too.
        """
        own = math.prod(self.shape) + (self.neurons if self.biased else 0)
        return own + self.neurons * (dendrites + 1)

    def op_weight(self, weight: Tensor) -> Tensor:
        """Return stacked weights (D, *shape) as the kernels take them, a view."""
        return weight.mT if self.input_first else weight

    def along_weight(self, values: Tensor) -> Tensor:
        """Line values per neuron (..., N) up with stacked weights (..., *shape), by broadcasting.

        In a grouped transposed convolution a neuron's weights lie in its group's rows of axis 0.
        """
        if self.input_first:
            return values[..., None, :]
        if not self.geometry.transposed:
            return values.reshape(*values.shape, *(1,) * (len(self.shape) - 1))
        groups, (channels, neurons) = self.geometry.groups, self.shape[:2]
        rows = values.reshape(*values.shape[:-1], groups, 1, neurons)
        rows = rows.expand(*values.shape[:-1], groups, channels // groups, neurons)
        return rows.reshape(*values.shape[:-1], channels, neurons, *(1,) * self.geometry.spatial)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An op with parameters that carries no dendrites, and the reason."""

    name: str
    op: str
    reason: str


def convolution_form(
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    mode: str = "zeros",
    output_padding: Any = None,
) -> tuple[Geometry, Padding | None]:
    """Return a convolution's geometry, and what it cannot pad by itself.

    Args:
        kernel: taps per spatial dimension.
        stride: a number or one per dimension; so are padding, which may also be "same" or
            "valid", and dilation.
        padding: see stride.
        dilation: see stride.
        groups: blocks of channels that do not see one another.
        mode: a padding mode of torch.
        output_padding: given for a transposed convolution, None for others.
    """
    dims = len(kernel)
    stride, dilation = expand(stride, dims), expand(dilation, dims)
    if output_padding is not None:
        widths = expand(padding, dims)
        return Geometry(stride, widths, dilation, groups, True, expand(output_padding, dims)), None
    if padding == "valid":
        padding = 0
    if padding == "same":
        # As torch defines it: what is left over goes to the end of the axis.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(width, width) for width in expand(padding, dims)]
    if mode == "zeros" and all(left == right for left, right in sides):
        return Geometry(stride, tuple(left for left, _ in sides), dilation, groups), None
    widths = tuple(width for side in reversed(sides) for width in side)
    before = Padding(widths, "constant" if mode == "zeros" else mode)
    return Geometry(stride, (0,) * dims, dilation, groups), before


def leaves(value: Any) -> tuple[Any, ...]:
    """Return the entries of a sequence, or a single value as the only one."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def expand(value: Any, dims: int) -> tuple[int, ...]:
    """Return one number per dimension; a single number holds for all."""
    values = leaves(value)
    return values * dims if len(values) == 1 else values
