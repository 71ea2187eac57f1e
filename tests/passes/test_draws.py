"""Weights are drawn alike on every device, uniformly, and without torch's generators."""

from __future__ import annotations

import pytest
import torch

from pbfx import draws

CPU = torch.device("cpu")


@pytest.mark.parametrize("total", [0, 1, 63, 100_003])
def test_both_ways_give_the_same_bits(total):
    keys = 0x12345678, 0x9ABCDEF0
    found = torch.from_numpy(draws._on_cpu(total, *keys))
    assert torch.equal(found, draws._on_device(total, *keys, CPU))


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws():
    shape = (7, 65, 129)
    assert torch.equal(
        draws.uniform(shape, "a", torch.device("cuda")).cpu(), draws.uniform(shape, "a", CPU)
    )


def test_they_are_uniform_and_independent():
    before = torch.get_rng_state()
    one, other = (draws.uniform((400, 1000), seed, CPU).double() for seed in ("0/1", "0/2"))
    assert torch.equal(torch.get_rng_state(), before)
    count = one.numel()
    assert 0 <= one.min() < one.max() < 1
    # Each within four standard errors.
    assert abs(one.mean() - 0.5) < 4 * (1 / 12 / count) ** 0.5
    assert abs(one.var() - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    flat = one.flatten()
    pairs = [(flat, other.flatten()), *((flat[:-k], flat[k:]) for k in (1, 2, 7, 1000))]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / count**0.5
    cells = torch.histc(flat.float(), 256, 0, 1)
    expected = count / 256
    # Chi squared with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert ((cells - expected) ** 2 / expected).sum() < 255 + 4 * 22.6


def test_a_prefix_is_the_same_draw():
    assert torch.equal(draws.uniform((9, 5), "s", CPU)[:4], draws.uniform((4, 5), "s", CPU))
