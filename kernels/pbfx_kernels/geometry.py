"""The form of a soma: a linear map, or a convolution over one to three spatial dimensions.

A transposed convolution has the form of the convolution that it transposes, so its weight is
`(channels, N / groups, *kernel)`: the neurons of one group share axis 1, and the groups lie one
after the other on axis 0.

A linear op is the convolution with no spatial dimensions: all tuples are empty, and the channel
axis, `-(n + 1)` for a convolution over `n` dimensions, is the last one. That one rule also covers
inputs without a batch dimension.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pbfx_kernels.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Geometry:
    """Describe how a soma, and so each of its dendrites, slides over its input.

    Args:
        stride: one step per spatial dimension, in input positions; empty for a linear op.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance between kernel taps per spatial dimension.
        groups: blocks of channels that do not see one another.
        transposed: whether it is a transposed convolution: `stride` then counts output positions
            and `padding` takes positions away.
        output_padding: positions added at the end of each spatial dimension of a transposed
            convolution's output; empty for every other op.

    Raises:
        ArgumentError: the tuples differ in length, are longer than three, or hold impossible
            values.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise ArgumentError("Geometry", faults)

    @classmethod
    def convolution(
        cls,
        spatial: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> "Geometry":
        """Build the geometry of a convolution; a single number holds for all dimensions.

        Args:
            spatial: number of spatial dimensions, 1 to 3.
            stride: one step for all dimensions, or one each.
            padding: likewise.
            dilation: likewise.
            groups: blocks of channels that do not see one another.
            transposed: whether it is a transposed convolution.
            output_padding: for a transposed convolution, likewise; left aside for others.

        Raises:
            ArgumentError: a sequence does not have `spatial` entries, or a value is impossible.
        """
        return cls(
            _spread(stride, spatial),
            _spread(padding, spatial),
            _spread(dilation, spatial),
            groups,
            transposed,
            _spread(output_padding, spatial) if transposed else (),
        )

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions `n`: 0 for a linear op."""
        return len(self.stride)

    @property
    def channel_axis(self) -> int:
        """Axis of the neurons in the soma's output (and of the channels in its input), negative."""
        return -(self.spatial + 1)

    @property
    def neuron_axis(self) -> int:
        """Axis of one weight along which the neurons of a group lie."""
        return 1 if self.transposed else 0

    def neurons(self, weight: Sequence[int]) -> int:
        """Return N, the number of neurons.

        Args:
            weight: shape of one weight, `(N, K)`, `(N, channels / groups, *kernel)`, or of a
                transposed convolution `(channels, N / groups, *kernel)`.
        """
        return weight[1] * self.groups if self.transposed else weight[0]

    def channels(self, weight: Sequence[int]) -> int:
        """Return how many channels the soma reads; K for a linear op.

        Args:
            weight: shape of one weight, as for `neurons`.
        """
        return weight[0] if self.transposed else weight[1] * self.groups

    def output_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Compute the shape of the soma's output.

        Args:
            x: shape of the input, `(..., K)` or `(B, channels, *spatial)`, the batch optional.
            weight: shape of one weight, as for `neurons`.

        Returns:
            `(..., N)` or `(B, N, *output_spatial)`.
        """
        first = len(x) - self.spatial
        extents = (
            self._extent(axis, size, weight[2 + axis]) for axis, size in enumerate(x[first:])
        )
        return (*x[: first - 1], self.neurons(weight), *extents)

    def _extent(self, axis: int, size: int, taps: int) -> int:
        # Formulas of torch.nn.Conv2d and torch.nn.ConvTranspose2d, "Shape".
        stride, padding = self.stride[axis], self.padding[axis]
        reach = self.dilation[axis] * (taps - 1)
        if self.transposed:
            return (size - 1) * stride - 2 * padding + reach + self.output_padding[axis] + 1
        return (size + 2 * padding - reach - 1) // stride + 1


def _spread(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    return (value,) * spatial if isinstance(value, int) else tuple(value)


def _faults(geometry: Geometry) -> list[str]:
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    faults: list[str] = []
    if not len(stride) == len(padding) == len(dilation) <= 3:
        faults.append(
            "stride, padding and dilation: expected the same number of entries, 0 to 3, "
            f"got {tuple(stride)}, {tuple(padding)}, {tuple(dilation)}"
        )
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
        ("groups", (geometry.groups,), 1),
        ("output_padding", geometry.output_padding, 0),
    ):
        if any(value < least for value in values):
            faults.append(f"{name}: expected at least {least}, got {tuple(values)}")
    if not stride and geometry.groups != 1:
        faults.append(f"groups: a linear op has one group, got {geometry.groups}")
    extra = geometry.output_padding
    if geometry.transposed and not stride:
        faults.append("transposed: a linear op has no transposed form, got True")
    elif geometry.transposed and len(extra) != len(stride):
        faults.append(
            f"output_padding: expected {len(stride)} entries as for stride, got {tuple(extra)}"
        )
    elif geometry.transposed and any(
        more >= max(step, gap) for more, step, gap in zip(extra, stride, dilation, strict=False)
    ):
        faults.append(
            "output_padding: expected less than stride or dilation, "
            f"got {tuple(extra)} with {tuple(stride)} and {tuple(dilation)}"
        )
    elif not geometry.transposed and extra:
        faults.append(f"output_padding: only a transposed convolution has one, got {tuple(extra)}")
    return faults


LINEAR = Geometry()


def geometry_of(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Geometry:
    """Put the arguments of an op together."""
    form = tuple(stride), tuple(padding), tuple(dilation)
    return _remembered(*form, groups, transposed, tuple(output_padding))


# A training loop meets a handful.
_remembered = functools.lru_cache(4096)(Geometry)


def arguments_of(geometry: Geometry) -> tuple[Any, ...]:
    """Take a geometry apart into the arguments of an op: what `geometry_of` puts together."""
    form = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return *form, geometry.transposed, geometry.output_padding


def with_geometry(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs of an op of dendrites with one geometry for its six arguments.

    Args:
        inputs: soma, x, weight, bias, to_soma, to_dendrite and activation; those six; any others.
    """
    return *inputs[:7], geometry_of(*inputs[7:13]), *inputs[13:]
