"""Policies are pure: scripted scores in, decisions out."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pbfx
from pbfx import (
    Action,
    ConfigError,
    Decision,
    EveryTime,
    Interval,
    Never,
    Phase,
    Plateau,
    SiteFigures,
    Situation,
    TrackerError,
)
from pbfx.policy import asked, fault_of, possible
from pbfx.settings import at


def neuron(*scores: float, **fields: object) -> Situation:
    return Situation(Phase.NEURON, scores, **{"max_dendrites": 3, **fields})


def dendrite(*candidate_scores: float | None, **fields: object) -> Situation:
    scores = (0.0,) * len(candidate_scores)
    return Situation(Phase.DENDRITE, scores, candidate_scores, **fields)


def actions(policy: pbfx.Policy, scores: list[float], **fields: object) -> list[Action]:
    """Feed the scores one by one; return what the policy says to each prefix."""
    prefixes = [scores[: end + 1] for end in range(len(scores))]
    return [policy.decide(neuron(*prefix, **fields)).action for prefix in prefixes]


C, G = Action.CONTINUE, Action.GROW


class TestPlateau:
    def test_patience_counts_epochs_without_improvement(self) -> None:
        policy = Plateau(patience=3)
        assert actions(policy, [1, 2, 2, 2, 2]) == [C, C, C, C, G]
        assert actions(policy, [1, 2, 2, 2, 3, 3, 3]) == [C] * 7
        assert actions(policy, [3, 2, 1, 0]) == [C, C, C, G]

    def test_minimising(self) -> None:
        policy = Plateau(patience=2)
        assert actions(policy, [3, 2, 2, 2], maximize=False) == [C, C, C, G]
        assert actions(policy, [1, 2, 3], maximize=False) == [C, C, G]
        assert actions(policy, [3, 2, 1, 0.5], maximize=False) == [C] * 4

    def test_relative_threshold(self) -> None:
        policy = Plateau(patience=1, relative_threshold=0.1, absolute_threshold=0)
        assert actions(policy, [100, 109]) == [C, G]
        assert actions(policy, [100, 111]) == [C, C]
        # Of the size of the best score, whatever its sign.
        assert actions(policy, [-100, -95]) == [C, G]
        assert actions(policy, [-100, -89]) == [C, C]

    def test_absolute_threshold(self) -> None:
        policy = Plateau(patience=1, relative_threshold=0, absolute_threshold=0.5)
        assert actions(policy, [0, 0.5]) == [C, G]
        assert actions(policy, [0, 0.75]) == [C, C]

    def test_both_thresholds_must_be_passed(self) -> None:
        policy = Plateau(patience=1, relative_threshold=0.1, absolute_threshold=0.5)
        assert actions(policy, [1, 1.4]) == [C, G]
        assert actions(policy, [10, 10.75]) == [C, G]
        assert actions(policy, [10, 11.5]) == [C, C]

    def test_slow_progress_below_the_threshold_is_no_plateau(self) -> None:
        """Each step is measured against the best score that counted, so steps add up."""
        policy = Plateau(patience=3, relative_threshold=0, absolute_threshold=1.0)
        assert actions(policy, [0, 0.6, 1.2, 1.8, 2.4, 3.0]) == [C] * 6

    def test_grace(self) -> None:
        policy = Plateau(patience=1, grace=4)
        assert actions(policy, [3, 2, 1, 0, 0]) == [C, C, C, C, G]

    def test_smoothing_judges_means(self) -> None:
        noisy = [0.0, 1.0, 0.4, 1.4, 0.8, 1.8]
        # Every second score is worse than the one before; their means only rise.
        assert G in actions(Plateau(patience=1), noisy)
        assert actions(Plateau(patience=1, smoothing=2), noisy) == [C] * 6
        # And one lucky score does not start the wait anew.
        thresholds = {"relative_threshold": 0, "absolute_threshold": 0.5}
        assert actions(Plateau(patience=3, **thresholds), [3, 3, 3, 4]) == [C] * 4
        smooth = Plateau(patience=3, smoothing=3, **thresholds)
        assert actions(smooth, [3, 3, 3, 4]) == [C, C, C, G]

    def test_max_epochs_ends_a_phase_that_still_improves(self) -> None:
        policy = Plateau(patience=9, max_epochs=3)
        decision = policy.decide(neuron(1, 2, 3))
        assert decision.action is G
        assert decision.reason == "3 epochs are over at 3: growing dendrite 1"
        assert policy.decide(neuron(1, 2)).action is C

    def test_max_epochs_outranks_grace(self) -> None:
        assert Plateau(grace=9, max_epochs=2).decide(neuron(1, 2)).action is G

    def test_the_reason_counts(self) -> None:
        policy = Plateau(patience=3)
        assert policy.decide(neuron(2, 1)).reason == "1 of 3 epochs without improvement"
        assert policy.decide(neuron(2, 1, 1, 1)).reason == (
            "no improvement for 3 epochs at 2: growing dendrite 1"
        )

    def test_enough_dendrites(self) -> None:
        decision = Plateau(patience=1).decide(neuron(2, 1, dendrites=3, accepted=1.0))
        assert decision == Decision(
            Action.COMPLETE, "no improvement for 1 epoch; max_dendrites=3 is reached", keep=True
        )
        assert Plateau(patience=1).decide(neuron(1, 1, max_dendrites=0)).action is Action.COMPLETE

    def test_a_set_that_does_not_help_is_dropped_and_retried(self) -> None:
        policy = Plateau(patience=1, tries=2)
        decision = policy.decide(neuron(0.8, 0.7, dendrites=1, accepted=0.9))
        assert (decision.action, decision.keep) == (Action.RETRY, False)
        assert "dendrite 1 did not help (0.8 against 0.9): dropped" in decision.reason

    def test_the_last_try_completes_without_it(self) -> None:
        policy = Plateau(patience=1, tries=2)
        decision = policy.decide(neuron(0.8, 0.7, dendrites=1, accepted=0.9, attempt=1))
        assert (decision.action, decision.keep) == (Action.COMPLETE, False)
        assert decision.reason.endswith("the last of 2 tries")
        once = Plateau(patience=1, tries=1)
        assert once.decide(neuron(0.8, 0.7, dendrites=1, accepted=0.9)).action is Action.COMPLETE

    def test_help_must_exceed_the_thresholds(self) -> None:
        policy = Plateau(patience=1, relative_threshold=0.1)
        barely = neuron(1.05, 1.0, dendrites=1, accepted=1.0)
        assert policy.decide(barely).action is Action.RETRY
        clearly = neuron(1.2, 1.0, dendrites=1, accepted=1.0)
        assert policy.decide(clearly).action is G

    def test_help_is_judged_by_the_best_epoch_of_the_phase(self) -> None:
        decision = Plateau(patience=2).decide(
            neuron(0.5, 0.95, 0.6, 0.7, dendrites=1, accepted=0.9)
        )
        assert decision.action is G

    def test_a_useless_last_dendrite_is_not_kept(self) -> None:
        """Reaching max_dendrites does not excuse one that did not help."""
        decision = Plateau(patience=1, tries=1).decide(
            neuron(0.8, 0.7, dendrites=3, max_dendrites=3, accepted=0.9)
        )
        assert (decision.action, decision.keep) == (Action.COMPLETE, False)

    def test_candidate_patience(self) -> None:
        policy = Plateau(candidate_patience=2)
        assert policy.decide(dendrite(0.1, 0.2)).action is C
        assert policy.decide(dendrite(0.1, 0.2, 0.2)).action is C
        decision = policy.decide(dendrite(0.1, 0.2, 0.2, 0.15))
        assert decision.action is Action.PROMOTE
        assert decision.reason == "candidates' correlation with the error stopped rising at 0.200"

    def test_candidate_scores_may_be_missing(self) -> None:
        policy = Plateau(candidate_patience=1, max_candidate_epochs=4)
        assert policy.decide(dendrite(None, None, None)).action is C
        assert policy.decide(dendrite(0.2, None, None)).action is C
        assert policy.decide(dendrite(0.2, None, 0.1)).action is Action.PROMOTE
        assert policy.decide(dendrite(*[None] * 4)).action is Action.PROMOTE

    def test_max_candidate_epochs(self) -> None:
        policy = Plateau(max_candidate_epochs=3)
        assert policy.decide(dendrite(0.1, 0.2)).action is C
        decision = policy.decide(dendrite(0.1, 0.2, 0.3))
        assert decision == Decision(Action.PROMOTE, "3 epochs of candidate learning are over")

    def test_validation_scores_do_not_end_a_dendrite_phase(self) -> None:
        rising = Situation(Phase.DENDRITE, (5.0, 1.0, 0.0), (0.1, 0.2, 0.3))
        assert Plateau(patience=1).decide(rising).action is C


def figures(p_value: float | None, batches: int = 40, site: str = "fc") -> SiteFigures:
    heldout = None if p_value is None else 0.01
    return SiteFigures(site, 4, 30, 0.1, 0.02, 0.5, heldout, batches, p_value)


class TestWillItPay:
    AT_CHANCE = (figures(0.5), figures(0.03, site="head"))

    def test_at_chance_candidates_go_on_learning_and_then_training_completes(self) -> None:
        policy = Plateau(candidate_patience=1, max_candidate_epochs=4)
        waiting = policy.decide(dendrite(0.2, 0.1, 0.1, sites=self.AT_CHANCE))
        assert waiting == Decision(C, "candidates are at chance so far, epoch 3 of at most 4")
        decision = policy.decide(dendrite(0.2, 0.1, 0.1, 0.1, sites=self.AT_CHANCE))
        assert (decision.action, decision.keep) == (Action.COMPLETE, True)
        assert decision.reason == (
            "4 epochs of candidate learning are over; no site's candidates correlate with the "
            "error on unseen batches (head most: r = 0.0100 on 40 batches, p = 0.03, 2 tested): "
            "dendrites would not pay"
        )

    def test_one_site_above_chance_is_enough(self) -> None:
        policy = Plateau(candidate_patience=1, max_candidate_epochs=9)
        sites = (figures(0.5), figures(0.02, site="head"))
        assert policy.decide(dendrite(0.2, 0.1, sites=sites)).action is Action.PROMOTE

    def test_the_more_sites_the_stricter(self) -> None:
        policy = Plateau(max_candidate_epochs=1)
        one = policy.decide(dendrite(0.1, sites=(figures(0.03),)))
        assert one.action is Action.PROMOTE
        two = policy.decide(dendrite(0.1, sites=(figures(0.03), figures(0.9, site="b"))))
        assert two.action is Action.COMPLETE

    def test_too_few_batches_conclude_nothing(self) -> None:
        policy = Plateau(max_candidate_epochs=1)
        for sites in (
            (figures(0.9, 19),),
            (figures(None, 1),),
            (),
            (figures(0.9), figures(0.9, 3)),
        ):
            assert policy.decide(dendrite(0.1, sites=sites)).action is Action.PROMOTE

    def test_it_can_be_turned_off(self) -> None:
        policy = Plateau(max_candidate_epochs=1, significance=None)
        assert policy.decide(dendrite(0.1, sites=self.AT_CHANCE)).action is Action.PROMOTE
        listed = Plateau(max_candidate_epochs=1, significance=[None, 0.05])
        first, later = (dendrite(0.1, sites=self.AT_CHANCE, dendrites=d) for d in (0, 1))
        assert listed.decide(first).action is Action.PROMOTE
        assert listed.decide(later).action is Action.COMPLETE

    def test_an_interval_grows_regardless(self) -> None:
        decision = Interval(1, 1).decide(dendrite(0.1, sites=self.AT_CHANCE))
        assert decision.action is Action.PROMOTE


class TestInterval:
    def test_fixed_lengths(self) -> None:
        policy = Interval(3, 2)
        assert actions(policy, [1, 2, 3]) == [C, C, G]
        assert policy.decide(dendrite(0.1)).action is C
        assert policy.decide(dendrite(0.1, 0.0)).action is Action.PROMOTE

    def test_completes_after_the_last_dendrite(self) -> None:
        decision = Interval(2).decide(neuron(2, 1, dendrites=3, accepted=1.5))
        assert decision == Decision(
            Action.COMPLETE, "2 epochs are over; max_dendrites=3 is reached", keep=True
        )

    @pytest.mark.parametrize(
        ("best", "accepted", "maximize", "keep"),
        [
            (1.0, None, True, True),
            (1.0, 0.9, True, True),
            (1.0, 1.0, True, False),
            (1.0, 1.1, True, False),
            (1.0, 1.1, False, True),
            (1.0, 0.9, False, False),
        ],
    )
    def test_keeps_only_what_is_better(
        self, best: float, accepted: float | None, maximize: bool, keep: bool
    ) -> None:
        now = neuron(best, accepted=accepted, maximize=maximize, dendrites=1)
        decision = Interval(1).decide(now)
        assert (decision.action, decision.keep) == (G, keep)


class TestEveryTime:
    def test_each_phase_lasts_one_epoch(self) -> None:
        policy = EveryTime()
        assert policy.decide(neuron(1.0)).action is G
        assert policy.decide(dendrite(0.1)).action is Action.PROMOTE
        assert policy.decide(neuron(1.0, dendrites=3)).action is Action.COMPLETE


class TestNever:
    def test_it_goes_on(self) -> None:
        decision = Never().decide(neuron(*[1.0] * 99))
        assert decision == Decision(C, "epoch 99")

    def test_it_completes_after_its_epochs(self) -> None:
        assert actions(Never(3), [1, 2, 3]) == [C, C, Action.COMPLETE]
        assert Never(1).decide(neuron(1.0, accepted=2.0)).keep is False
        assert Never(1).decide(neuron(1.0, accepted=0.5)).keep is True

    def test_it_ends_a_dendrite_phase(self) -> None:
        assert Never().decide(dendrite(0.1)).action is Action.PROMOTE


class TestLists:
    """A list is indexed by the number of dendrites; its last value stands for all beyond."""

    def test_the_first_interval_may_be_another(self) -> None:
        policy = Interval([3, 1], [2, 1])
        assert actions(policy, [1, 2, 3]) == [C, C, G]
        assert actions(policy, [1], dendrites=1) == [G]
        assert actions(policy, [1], dendrites=2) == [G]
        assert policy.decide(dendrite(0.1, dendrites=0)).action is C
        assert policy.decide(dendrite(0.1, dendrites=1)).action is Action.PROMOTE

    def test_thresholds_by_dendrites(self) -> None:
        policy = Plateau(patience=1, relative_threshold=[0.1, 0.0])
        assert actions(policy, [1.0, 1.05]) == [C, G]
        assert actions(policy, [1.0, 1.05], dendrites=1) == [C, C]

    def test_none_in_a_list(self) -> None:
        policy = Plateau(patience=9, max_epochs=[None, 2])
        assert actions(policy, [1, 2, 3]) == [C, C, C]
        assert actions(policy, [1, 2], dendrites=1) == [C, G]

    def test_lists_become_tuples(self) -> None:
        policy = Plateau(patience=[3, 2])
        assert policy.patience == (3, 2)
        assert hash(policy) == hash(Plateau(patience=(3, 2)))


class TestFunctions:
    def test_a_function_is_a_policy(self) -> None:
        def policy(situation: Situation) -> Decision:
            return Decision(G if len(situation.scores) > 1 else C, "my own rule")

        assert fault_of(policy) is None
        assert asked(policy, neuron(1.0)) == Decision(C, "my own rule")
        assert asked(Plateau(), neuron(1.0)) == Plateau().decide(neuron(1.0))

    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            (Plateau, "policy must be an instance, got the class Plateau; call it first"),
            ("plateau", "policy must have a method decide(situation) or be a function"),
            (None, "got None"),
        ],
    )
    def test_what_is_none(self, policy: object, message: str) -> None:
        assert message in (fault_of(policy) or "")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plateau(significance=0), "significance must be between 0 and 1, got 0"),
        (lambda: Plateau(significance=[0.1, 1.0]), "significance[1] must be between 0 and 1"),
        (lambda: Plateau(significance="1"), "significance must be a finite number"),
        (lambda: Plateau(patience=[]), "patience must not be an empty list"),
        (lambda: Plateau(tries=[2, 0]), "tries[1] must be a whole number of at least 1, got 0"),
        (
            lambda: Plateau(candidate_patience=[None]),
            "candidate_patience[0] must be a whole number of at least 1, got None",
        ),
        (lambda: Interval([2, True]), "neuron_epochs[1] must be a whole number of at least 1"),
        (lambda: Never(0), "pbfx.Never: epochs must be a whole number of at least 1, got 0"),
        (lambda: Plateau(patience=0), "patience must be a whole number of at least 1, got 0"),
        (lambda: Plateau(patience=2.0), "patience must be a whole number of at least 1, got 2.0"),
        (lambda: Plateau(patience=True), "patience must be a whole number of at least 1, got True"),
        (lambda: Plateau(patience="3"), "patience must be a whole number of at least 1, got '3'"),
        (lambda: Plateau(smoothing=0), "smoothing must be a whole number of at least 1, got 0"),
        (lambda: Plateau(grace=-1), "grace must be a whole number of at least 0, got -1"),
        (lambda: Plateau(tries=0), "tries must be a whole number of at least 1, got 0"),
        (lambda: Plateau(max_epochs=0), "max_epochs must be a whole number of at least 1, got 0"),
        (
            lambda: Plateau(relative_threshold=-0.1),
            "relative_threshold must be a finite number of at least 0.0, got -0.1",
        ),
        (
            lambda: Plateau(absolute_threshold=float("nan")),
            "absolute_threshold must be a finite number of at least 0.0, got nan",
        ),
        (
            lambda: Plateau(candidate_patience=0),
            "candidate_patience must be a whole number of at least 1, got 0",
        ),
        (
            lambda: Plateau(max_candidate_epochs=None),
            "max_candidate_epochs must be a whole number of at least 1, got None",
        ),
        (lambda: Interval(0), "neuron_epochs must be a whole number of at least 1, got 0"),
        (
            lambda: Interval(1, 1.5),
            "dendrite_epochs must be a whole number of at least 1, got 1.5",
        ),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^pbfx.Plateau: patience .*; smoothing .*; tries .*"):
        Plateau(patience=0, smoothing=0, tries=0)


SCORES = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=12
)


SITES = st.builds(
    figures, st.none() | st.floats(0, 1), st.integers(0, 99), st.sampled_from(["", "fc", "head"])
)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    scores = tuple(draw(SCORES))
    phase = draw(st.sampled_from(Phase))
    candidate = st.none() | st.floats(0, 1)
    size = len(scores)
    return Situation(
        phase=phase,
        scores=scores,
        candidate_scores=tuple(draw(st.lists(candidate, min_size=size, max_size=size))),
        dendrites=draw(st.integers(0, 3)),
        max_dendrites=draw(st.integers(0, 3)),
        attempt=draw(st.integers(0, 3)),
        accepted=draw(st.none() | SCORES.map(lambda scores: scores[0])),
        maximize=draw(st.booleans()),
        sites=tuple(draw(st.lists(SITES, max_size=3))),
    )


def per_dendrite(values: st.SearchStrategy) -> st.SearchStrategy:
    return values | st.lists(values, min_size=1, max_size=3)


PLATEAUS = st.builds(
    Plateau,
    patience=per_dendrite(st.integers(1, 5)),
    smoothing=per_dendrite(st.integers(1, 4)),
    relative_threshold=per_dendrite(st.sampled_from([0.0, 1e-4, 0.1])),
    absolute_threshold=per_dendrite(st.sampled_from([0.0, 1e-5, 1.0])),
    grace=per_dendrite(st.integers(0, 5)),
    tries=per_dendrite(st.integers(1, 3)),
    max_epochs=per_dendrite(st.none() | st.integers(1, 8)),
    candidate_patience=per_dendrite(st.integers(1, 3)),
    max_candidate_epochs=per_dendrite(st.integers(1, 8)),
    significance=per_dendrite(st.none() | st.sampled_from([0.01, 0.5])),
)
EPOCHS = per_dendrite(st.integers(1, 6))
POLICIES = (
    PLATEAUS
    | st.builds(Interval, neuron_epochs=EPOCHS, dendrite_epochs=EPOCHS)
    | st.builds(EveryTime)
    | st.builds(Never, epochs=EPOCHS | st.none())
)


@given(policy=POLICIES, situation=situations())
def test_a_list_decides_as_its_value_for_this_number_of_dendrites(
    policy: pbfx.Policy, situation: Situation
) -> None:
    settings = {
        field.name: at(getattr(policy, field.name), situation.dendrites)
        for field in dataclasses.fields(policy)
    }
    assert dataclasses.replace(policy, **settings).decide(situation) == policy.decide(situation)


@given(policy=POLICIES, situation=situations(), others=st.lists(situations(), max_size=4))
def test_a_decision_depends_on_the_situation_alone(
    policy: pbfx.Policy, situation: Situation, others: list[Situation]
) -> None:
    first = policy.decide(situation)
    for other in others:
        policy.decide(other)
    assert policy.decide(situation) == first
    assert dataclasses.replace(policy).decide(dataclasses.replace(situation)) == first


@given(policy=POLICIES, situation=situations())
def test_minimising_mirrors_maximising(policy: pbfx.Policy, situation: Situation) -> None:
    mirrored = dataclasses.replace(
        situation,
        scores=tuple(-score for score in situation.scores),
        accepted=None if situation.accepted is None else -situation.accepted,
        maximize=not situation.maximize,
    )
    ours, theirs = policy.decide(situation), policy.decide(mirrored)
    assert (ours.action, ours.keep) == (theirs.action, theirs.keep)


@given(policy=POLICIES, situation=situations())
def test_decisions_can_be_carried_out_and_say_why(
    policy: pbfx.Policy, situation: Situation
) -> None:
    decision = policy.decide(situation)
    assert possible(decision, situation) is decision
    assert decision.reason
    assert decision.reason[0] == decision.reason[0].lower()
    if decision.action is G:
        assert situation.dendrites < situation.max_dendrites


@pytest.mark.parametrize(
    ("situation", "decision", "message"),
    [
        (neuron(1.0), Decision(Action.PROMOTE, "x"), "decided 'promote' in the neuron phase"),
        (
            neuron(1.0),
            Decision(Action.RETRY, "x", keep=False),
            "decided 'retry' without keeping the phase's network in the neuron phase, after 1 "
            "epoch; possible there: 'continue', 'grow'",
        ),
        (neuron(1.0), Decision(Action.COMPLETE, "x", keep=False), "decided 'complete' without"),
        (dendrite(0.1), Decision(G, "x"), "decided 'grow' in the dendrite phase"),
        (neuron(1.0), "grow", "must return a pbfx.Decision, got 'grow'"),
        (neuron(1.0), None, "must return a pbfx.Decision, got None"),
    ],
)
def test_impossible_decisions(situation: Situation, decision: object, message: str) -> None:
    with pytest.raises(TrackerError) as error:
        possible(decision, situation)
    assert message in str(error.value)
