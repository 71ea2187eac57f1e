"""The form of a soma: a linear map, or a convolution over one to three spatial dimensions.

A linear op is the convolution with no spatial dimensions: all tuples are empty, and the channel
axis, `-(n + 1)` for a convolution over `n` dimensions, is the last one. That one rule also covers
inputs without a batch dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pbfx_kernels.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Geometry:
    """Describe how a soma, and so each of its dendrites, slides over its input.

    Args:
        stride: one step per spatial dimension, in input positions; empty for a linear op.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance between kernel taps per spatial dimension.
        groups: blocks of channels that do not see one another.

    Raises:
        ArgumentError: the tuples differ in length, are longer than three, or hold impossible
            values.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

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
    ) -> "Geometry":
        """Build the geometry of a convolution; a single number holds for all dimensions.

        Args:
            spatial: number of spatial dimensions, 1 to 3.
            stride: one step for all dimensions, or one each.
            padding: likewise.
            dilation: likewise.
            groups: blocks of channels that do not see one another.

        Raises:
            ArgumentError: a sequence does not have `spatial` entries, or a value is impossible.
        """
        return cls(
            _spread(stride, spatial), _spread(padding, spatial), _spread(dilation, spatial), groups
        )

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions `n`: 0 for a linear op."""
        return len(self.stride)

    @property
    def channel_axis(self) -> int:
        """Axis of the neurons in the soma's output (and of the channels in its input), negative."""
        return -(self.spatial + 1)

    def output_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """Compute the shape of the soma's output.

        Args:
            x: shape of the input, `(..., K)` or `(B, channels, *spatial)`, the batch optional.
            weight: shape of one weight, `(N, K)` or `(N, channels / groups, *kernel)`.

        Returns:
            `(..., N)` or `(B, N, *output_spatial)`.
        """
        # Formula of torch.nn.Conv2d, "Shape".
        extents = (
            (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            for size, taps, stride, padding, dilation in zip(
                x[len(x) - self.spatial :],
                weight[2:],
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        return (*x[: len(x) - self.spatial - 1], weight[0], *extents)


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
    ):
        if any(value < least for value in values):
            faults.append(f"{name}: expected at least {least}, got {tuple(values)}")
    if not stride and geometry.groups != 1:
        faults.append(f"groups: a linear op has one group, got {geometry.groups}")
    return faults


LINEAR = Geometry()
