"""What pays is chosen by held-out correlation, space and cost, under the limits that were set."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pbfx
from pbfx.learning import Prospect, predicted_gains, samples_per_batch, select

# 64 samples a batch, 20 batches that measured, 4 candidates over 5 epochs.
MEASURED = {"positions": 1280.0, "batches": 20.0, "epoch_batches": 80.0, "tries": 20}
HEAD = Prospect("head", (0.3, -0.2, 0.02, 0.25), cost=10, **MEASURED)
# As many channels, each of 36 positions a sample.
CONV = Prospect("conv", (0.03, -0.05, 0.01, 0.04), cost=20, **MEASURED | {"positions": 36 * 1280.0})


def test_the_gain_is_half_of_r_squared_for_each_position_of_a_sample():
    assert samples_per_batch([HEAD, CONV]) == 64
    assert predicted_gains(HEAD, 64) == pytest.approx([0.045, 0.02, 0.0, 0.03125])
    assert predicted_gains(CONV, 64) == pytest.approx([0.0162, 0.045, 0.0, 0.0288])


def test_channels_at_chance_grow_nowhere():
    head, conv = select([HEAD, CONV])
    assert (head.channels, conv.channels) == ((0, 1, 3), (0, 1, 3))
    assert head.gain == pytest.approx(0.09625)
    assert (head.parameters, conv.parameters) == (30, 60)
    assert "3 of 4 channels" in head.reason
    noise = dataclasses.replace(HEAD, correlations=(0.05, -0.06))
    (choice,) = select([noise])
    assert choice.channels == ()
    assert "0.06 at most, is at chance" in choice.reason


def test_chance_is_what_the_best_of_many_candidates_shows_on_noise():
    """On noise one site in so many tries exceeds it now and then, and no more than that."""
    torch.manual_seed(0)
    channels, samples = 10, 256
    errors = torch.randn(200, channels, 1, samples)
    best = (torch.randn(200, channels, 20, samples) * errors).mean(-1).abs().amax(-1)
    chance = Prospect("", (0.0,) * channels, samples, 4, 16, 20, 1).chance
    exceeded = float((best > chance).any(-1).float().mean())
    assert 0.0 < exceeded < 0.5
    # And a candidate that is twice as good is seen.
    assert chance < 0.21


def test_the_best_sites_by_gain_per_parameter():
    # head: 0.09625 / 30, conv: 0.09 / 60.
    head, conv = select([HEAD, CONV], top_k=1)
    assert (len(head.channels), conv.channels) == (3, ())
    assert "top_k" in conv.reason
    head, conv = select([dataclasses.replace(HEAD, cost=60), CONV], top_k=1)
    assert (head.channels, len(conv.channels)) == ((), 3)
    assert [len(c.channels) for c in select([HEAD, CONV], top_k=5)] == [3, 3]


def test_a_budget_takes_the_best_channels():
    for budget, heads, convs in (
        (9, (), ()),
        (10, (0,), ()),
        (25, (0, 3), ()),
        # 0.00225 a parameter: the best of the convolution stands before the head's third.
        (40, (0, 3), (1,)),
        (50, (0, 1, 3), (1,)),
        (90, (0, 1, 3), (0, 1, 3)),
    ):
        head, conv = select([HEAD, CONV], parameters=budget)
        assert (head.channels, conv.channels) == (heads, convs)
        assert head.parameters + conv.parameters <= budget
    assert "growth_parameters" in select([HEAD], parameters=9)[0].reason


def test_what_costs_more_than_it_brings_does_not_grow():
    # 0.09625 nats over 80 * 64 samples are 493 nats, for 3 neurons.
    large = dataclasses.replace(HEAD, cost=1000)
    (choice,) = select([large])
    assert choice.channels == ()
    assert "0.0963 nats per sample does not pay for 4,000 parameters" in choice.reason
    # Of the neurons alone that bring more than they cost.
    assert select([dataclasses.replace(HEAD, cost=150)])[0].channels == (0, 3)


def test_groups_and_sites_that_have_dendrites_stay_whole():
    paired = dataclasses.replace(HEAD, together=2)
    assert select([paired])[0].channels == (0, 1, 2, 3)
    assert select([paired], parameters=39)[0].channels == (0, 1)
    assert select([dataclasses.replace(HEAD, together=4)], parameters=39)[0].channels == ()
    # One poor neuron comes along, a site of poor ones does not.
    assert select([dataclasses.replace(HEAD, together=4)])[0].channels == (0, 1, 2, 3)


def test_nothing_measured_is_nothing_grown():
    silent = Prospect("aux", (0.0, 0.0), 0.0, 0.0, 0.0, 4, 10)
    assert samples_per_batch([silent]) == 1.0
    choices = select([silent, HEAD])
    assert [len(c.channels) for c in choices] == [0, 3]
    assert "nothing was measured" in choices[0].reason
    assert select([]) == []


@given(
    st.lists(
        st.builds(
            Prospect,
            site=st.uuids().map(str),
            correlations=st.lists(st.floats(-1, 1), min_size=6, max_size=6).map(tuple),
            positions=st.just(0.0) | st.floats(1, 1e9),
            batches=st.integers(0, 10**4).map(float),
            epoch_batches=st.integers(0, 10**5).map(float),
            tries=st.integers(1, 100),
            cost=st.integers(1, 10**6),
            together=st.sampled_from([1, 2, 3, 6]),
        ),
        max_size=5,
        unique_by=lambda p: p.site,
    ),
    st.none() | st.integers(1, 6),
    st.none() | st.integers(1, 10**7),
)
def test_limits_hold_whatever_was_measured(prospects, top_k, budget):
    choices = select(prospects, top_k, budget)
    assert [c.site for c in choices] == [p.site for p in prospects]
    assert budget is None or sum(c.parameters for c in choices) <= budget
    assert top_k is None or sum(bool(c.channels) for c in choices) <= top_k
    for choice, prospect in zip(choices, prospects, strict=True):
        assert list(choice.channels) == sorted(set(choice.channels))
        assert choice.parameters == prospect.cost * len(choice.channels)
        assert {c // prospect.together for c in choice.channels} == {
            c // prospect.together for c in choice.channels if c % prospect.together == 0
        }
        assert len(choice.channels) % prospect.together == 0
        assert choice.reason


def test_settings_are_checked():
    pbfx.Config(sites="auto", top_k=2, growth_parameters=1000, learning="sham")
    for settings, words in (
        ({"sites": "some"}, "sites is unknown, got 'some'"),
        ({"sites": "auto", "top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"sites": "auto", "growth_parameters": 1.5}, "growth_parameters must be a whole number"),
        ({"top_k": 2}, "top_k chooses among sites, which needs sites='auto'"),
        ({"growth_parameters": 2}, "needs sites='auto', got 'all'"),
        ({"sites": "auto", "learning": "gradient"}, 'learning="gradient" has not'),
    ):
        with pytest.raises(pbfx.ConfigError, match=words):
            pbfx.Config(**settings)
