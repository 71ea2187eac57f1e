"""Weights are drawn alike on every device, uniformly, and without torch's generators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pbfx
from pbfx import draws

CPU = torch.device("cpu")


@pytest.mark.parametrize("total", [0, 1, 63, 100_003])
def test_both_ways_give_the_same_bits(total):
    keys, others = [0x12345678, 0x9ABCDEF0], [0xFEDCBA98, 0x76543210]
    parts = draws._on_device([total, 17], [keys, others], CPU).split([total, 17])
    assert torch.equal(parts[0], torch.from_numpy(draws._on_cpu(total, *keys)))
    assert torch.equal(parts[1], torch.from_numpy(draws._on_cpu(17, *others)))


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


def test_sites_drawn_together_get_what_each_would_get_alone(monkeypatch):
    model = pbfx.transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)))
    sites = model.perforation.sites
    wanted = [
        draws.Draw(site, torch.empty(0, dtype=dtype), count, f"seed/{index}")
        for index, (site, count) in enumerate([(sites[0], 3), (sites[1], 2), (sites[0], 1)])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    alone = [draws.draw_weights([draw])[0] for draw in wanted]
    for most in (1, 100, 2**25):
        monkeypatch.setattr(draws, "_MOST_AT_ONCE", most)
        for draw, found, expected in zip(wanted, draws.draw_weights(wanted), alone, strict=True):
            for tensor, same in zip(found, expected, strict=True):
                assert tensor.dtype is draw.like.dtype
                assert torch.equal(tensor, same)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_a_device_draws_together_has_memory_of_its_own(monkeypatch):
    model = pbfx.transform(nn.Linear(7, 5))
    draw = draws.Draw(model.perforation.sites[0], torch.empty(0), 3, "seed")
    (alone,) = draws.draw_weights([draw])
    # The way of other devices, on this one.
    monkeypatch.setattr(draws, "_has_own_memory", lambda device: False)
    found = draws.draw_weights([draw, draw])
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, alone, strict=True))
    assert all(t.untyped_storage().nbytes() == t.nbytes for pair in found for t in pair)


@pytest.mark.gpu
def test_a_gpu_draws_the_weights_that_the_cpu_draws():
    model = pbfx.transform(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 50)))
    sites = model.perforation.sites
    found, wanted = (
        draws.draw_weights([draws.Draw(s, torch.empty(0, device=d), 4, s.name) for s in sites])
        for d in ("cuda", "cpu")
    )
    for tensors, expected in zip(found, wanted, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors, expected, strict=True))
