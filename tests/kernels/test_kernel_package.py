"""The package itself: what importing it costs, what it exports, and the shapes that it predicts."""

import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Site
from tolerances import relative_error

import pbfx_kernels
from pbfx_kernels import Geometry, Moment

_LIST_NEW_MODULES = """
import sys, torch
before = set(sys.modules)
import pbfx_kernels
print(*sorted(set(sys.modules) - before))
"""


def test_import_is_lean() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _LIST_NEW_MODULES],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    new = run.stdout.split()
    assert "pbfx_kernels" in new
    heavy = [m for m in new if m.split(".")[0] == "triton" or m.startswith("torch._dynamo")]
    assert heavy == []
    assert [m for m in new if m.split(".")[0] not in ("pbfx_kernels", "torch")] == []


def test_public_names() -> None:
    assert set(pbfx_kernels.__all__) == {
        "ACTIVATIONS",
        "LINEAR",
        "ArgumentError",
        "Geometry",
        "Moment",
        "candidates",
        "dendrites",
        "full_dendrites",
        "perforated_conv2d",
        "perforated_linear",
        "reference",
    }
    assert all(getattr(pbfx_kernels, name).__doc__ for name in pbfx_kernels.__all__)


def test_moment_rows() -> None:
    assert [row.name for row in Moment] == ["COUNT", "A", "AA", "G", "GG", "AG"]
    assert torch.zeros(6, 3, 4)[Moment.AG].shape == (3, 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_output_shape_is_that_of_torch(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(spatial))

    groups, taps, dilation = data.draw(st.integers(1, 3)), each(1, 3), each(1, 2)
    stride, padding, transposed = each(1, 3), each(0, 2), data.draw(st.booleans())
    more = tuple(
        data.draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True)
    )
    geometry = Geometry(stride, padding, dilation, groups, transposed, more if transposed else ())
    extents = tuple(
        d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, taps, each(0, 4), strict=True)
    )
    batch = data.draw(st.sampled_from([(), (0,), (2,)]))
    site = Site("drawn", (*batch, groups, *extents), (2 * groups, 1, *taps), geometry)
    if transposed:
        # Enough that padding leaves something over.
        extents = tuple(extent + 4 for extent in extents)
        site = Site("drawn", (*batch, groups, *extents), (groups, 2, *taps), geometry)
        assert geometry.channels(site.weight) == groups
        assert geometry.neurons(site.weight) == 2 * groups
    out = site.soma(torch.zeros(site.x), torch.zeros(site.weight), None)
    assert geometry.output_shape(site.x, site.weight) == tuple(out.shape)


def test_nan_never_passes() -> None:
    ones = torch.ones(3)
    assert not relative_error(ones * torch.nan, ones) <= 1e9
    assert not relative_error(ones, ones * torch.nan) <= 1e9
