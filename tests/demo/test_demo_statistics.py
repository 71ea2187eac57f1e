"""Intervals against numbers worked out by hand, and sentences that claim no more than they show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from pbfx.demo.statistics import compare, estimate
from pbfx.demo.summary import summarise


@dataclass(frozen=True)
class Outcome:
    arm: str
    seed: int
    error: float
    parameters: int = 100
    epochs: int = 9
    seconds: float = 1.0


def outcomes(**errors: list[float]) -> list[Outcome]:
    return [Outcome(arm, seed, e) for arm, row in errors.items() for seed, e in enumerate(row)]


def test_estimate_by_hand():
    # 1, 2, 3, 4: mean 2.5, s² = 5/3, standard error √(5/12) = 0.645497, t(0.975, 3) = 3.182446.
    found = estimate([1, 2, 3, 4])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(3.182446 * 0.645497, rel=1e-5)
    assert found.low == pytest.approx(2.5 - 2.054260, rel=1e-5)


def test_one_value_has_no_interval():
    found = estimate([7.0])
    assert found.mean == 7.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert compare([1.0], [2.0]).verdict == "undecided"


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_compare_is_paired():
    # Differences -1, -1.2, -0.8: mean -1, s = 0.2, t(0.975, 2) = 4.302653, half 4.302653·0.2/√3.
    found = compare([9.0, 18.8, 29.2], [10.0, 20.0, 30.0])
    assert found.difference.mean == pytest.approx(-1.0)
    assert found.difference.half_width == pytest.approx(0.496828, rel=1e-5)
    assert found.relative == pytest.approx(-1 / 20)
    assert found.verdict == "lower"


def test_compare_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="pairs"):
        compare([1.0, 2.0], [1.0])


def test_no_error_left_has_no_relative_change():
    assert math.isnan(compare([0.0, 0.0], [0.0, 0.0]).relative)


def test_pairs_are_matched_by_seed_whatever_the_order():
    runs = outcomes(plain=[1.0, 2.0, 3.0], dendritic=[0.9, 1.9, 2.9])
    found = summarise([*runs[:3], *reversed(runs[3:])]).comparisons[0].comparison
    assert found.difference.half_width == pytest.approx(0, abs=1e-9)
    assert found.difference.mean == pytest.approx(-0.1)


LOW, MID, HIGH = [1.0, 1.1, 1.2], [5.0, 5.1, 5.2], [9.0, 9.1, 9.3]


@pytest.mark.parametrize(
    ("plain", "sham", "says"),
    [
        (HIGH, HIGH, "lower than plain's and sham's: dendrites bring more"),
        (HIGH, MID, "lower than plain's and not distinguishable from sham's: the restarts alone"),
        (HIGH, LOW, "lower than plain's and higher than sham's"),
        (MID, MID, "not distinguishable from plain's or sham's: this run shows neither"),
        (MID, HIGH, "lower than sham's and not distinguishable from plain's: dendrites only"),
        (MID, LOW, "higher than sham's and not distinguishable from plain's: dendrites do harm"),
        (LOW, LOW, "higher than plain's and sham's: dendrites do harm here."),
        (LOW, MID, "higher than plain's and not distinguishable from sham's: the restarts alone"),
        (LOW, HIGH, "lower than sham's and higher than plain's"),
    ],
)
def test_the_sentence_says_gain_loss_and_tie(plain: list[float], sham: list[float], says: str):
    summary = summarise(outcomes(plain=plain, sham=sham, dendritic=[5.1, 5.0, 5.2]))
    (sentence,) = summary.sentences
    assert sentence.startswith("Over 3 paired seeds, dendritic's test error is ")
    assert says in sentence


def test_one_seed_claims_nothing():
    summary = summarise(outcomes(plain=[9.0], sham=[9.0], dendritic=[1.0]))
    assert summary.sentences == (
        "One seed has no interval: nothing can be said about chance; try --seeds 5 or more.",
    )


def test_arms_alone_are_not_compared():
    summary = summarise(outcomes(dendritic=[1.0, 2.0]))
    assert summary.comparisons == ()
    assert summary.sentences == ()
    assert summary.arms[0].accuracy == 98.5
