"""When it grows and when it stops: `perforatedai` 3.2.9 on scripted scores, against pbfx."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pbfx
from compat.make_rival_files import FILES, SCRIPTS, SEEDS, decision_jobs
from compat.rival_rules import ALL, Difference, decide, events
from pbfx.compat.decisions import DEFAULTS, SWITCH_MODES, policy_of

JOBS = decision_jobs()
RECORDED: list[list[list[int]]] = json.loads((FILES / "decisions.json").read_text("utf-8"))
IDS = [
    f"{'-'.join(str(v) for v in settings.values())}-{limit}-{seed}"
    for (settings, limit, _), seed in itertools.product(SCRIPTS, SEEDS)
]


def rules(job: dict[str, Any], differences: frozenset[Difference]) -> list[list[int]]:
    settings = dict(job["settings"])
    limit = settings.pop("max_dendrites")
    return decide(settings, job["scores"], job["maximize"], differences, limit)


def ours(job: dict[str, Any]) -> list[list[int]]:
    """Return what a tracker does with the policy that stands for the settings."""
    settings = dict(job["settings"])
    limit = settings.pop("max_dendrites")
    model = pbfx.transform(nn.Sequential(nn.Linear(3, 2)), pbfx.Config(learning="gradient"))
    tracker = pbfx.Tracker(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        policy=policy_of(settings),
        max_dendrites=limit,
        maximize=job["maximize"],
    )
    decisions = []
    for score in job["scores"]:
        step = tracker.step(score)
        decisions.append([int(step.restructured), int(step.complete), step.dendrites])
        if step.complete:
            break
    return decisions


@pytest.mark.parametrize(("job", "recorded"), list(zip(JOBS, RECORDED, strict=True)), ids=IDS)
def test_the_rules_with_all_differences_are_what_it_decides(job, recorded):
    assert events(rules(job, ALL)) == recorded


@pytest.mark.parametrize("job", JOBS, ids=IDS)
def test_the_rules_without_differences_are_what_pbfx_decides(job):
    found, wanted = ours(job), rules(job, frozenset())
    # Completion restores the best network, and says that the model has changed also where it grew
    # nothing.
    assert found == wanted


@pytest.mark.parametrize("difference", Difference)
def test_every_difference_shows_in_some_script(difference):
    assert any(rules(job, ALL) != rules(job, ALL - {difference}) for job in JOBS)


def test_both_decide_alike_where_no_difference_bites():
    alike = [
        (job, recorded)
        for job, recorded in zip(JOBS, RECORDED, strict=True)
        if all(rules(job, ALL) == rules(job, ALL - {one}) for one in Difference)
    ]
    modes = {job["settings"]["switch_mode"] for job, _ in alike}
    assert modes == set(SWITCH_MODES), "every mode should be among them"
    for job, recorded in alike:
        assert events(ours(job)) == recorded, job


def test_the_page_counts_what_is_so():
    page = (Path(__file__).parents[2] / "docs" / "equivalence.md").read_text("utf-8")
    alike = sum(events(ours(job)) == recorded for job, recorded in zip(JOBS, RECORDED, strict=True))
    assert f"**{alike} give the same run" in page
    counts = {
        one: sum(rules(job, ALL) != rules(job, ALL - {one}) for job in JOBS) for one in Difference
    }
    rules_table = page.partition("## A training run")[0]
    shown = [int(number) for number in re.findall(r"\| (\d+)(?: of 68)? \|", rules_table)]
    assert shown == sorted(counts.values(), reverse=True)


@pytest.mark.parametrize("number", range(4))
def test_modes_go_by_their_numbers_too(number):
    assert policy_of({"switch_mode": number}) == policy_of({"switch_mode": SWITCH_MODES[number]})


def test_defaults_are_those_of_the_package():
    assert policy_of({}) == pbfx.Plateau(
        patience=10, relative_threshold=(1e-3, 1e-4, 0.0), absolute_threshold=1e-5, tries=2
    )
    assert set(DEFAULTS) >= {"n_epochs_to_switch", "fixed_switch_num", "max_dendrite_tries"}


def test_any_setting_may_be_a_list():
    policy = policy_of({"n_epochs_to_switch": [5, 3], "initial_history_after_switches": [0, 2, 4]})
    assert policy == pbfx.Plateau(
        patience=(5, 3),
        grace=(0, 5, 7),
        relative_threshold=(1e-3, 1e-4, 0.0),
        absolute_threshold=1e-5,
    )
    fixed = {"switch_mode": "DOING_FIXED_SWITCH", "fixed_switch_num": [4, 2]}
    assert policy_of(fixed).max_epochs == (4, 2)
    assert policy_of(fixed | {"first_fixed_switch_num": 6}).max_epochs == (8, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_epochs_to_swich": 3}, "did you mean 'n_epochs_to_switch'"),
        ({"switch_mode": "DOING_HISTORI"}, "did you mean 'DOING_HISTORY'"),
        ({"switch_mode": 7}, "a number from 0 to 3"),
        ({"switch_mode": True}, "switch_mode is unknown, got True"),
        ({"n_epochs_to_switch": 0}, "patience must be a whole number"),
    ],
)
def test_faults_are_named(settings, words):
    with pytest.raises(pbfx.ConfigError, match=words):
        policy_of(settings)
