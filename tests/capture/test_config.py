"""A Config is right when it exists: all of its faults are named at once, when it is made."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest

import pbfx
from pbfx.config import (
    ACTIVATIONS,
    BIASES,
    LEARNING,
    OBJECTIVES,
    TUNING,
    Bias,
    Learning,
    Objective,
    Tuning,
)
from pbfx_kernels import reference

BAD = [
    ({"include": 3}, "include must be a glob or a tuple of globs, got 3"),
    ({"include": None}, "include must be a glob or a tuple of globs, got None"),
    ({"exclude": ("fc", 1)}, r"exclude must be a glob or a tuple of globs, got \('fc', 1\)"),
    ({"filter_fn": "fc1"}, "filter_fn must be callable, got 'fc1'"),
    ({"learning": "perforate"}, "learning is unknown, got 'perforate': did you mean 'perforated'"),
    ({"tuning": "none"}, "tuning is unknown, got 'none': "),
    ({"finish": 1}, "finish must be True or False, got 1"),
    ({"initial_link": -0.1}, r"initial_link must be a number in \[0, 1\], got -0.1"),
    ({"initial_link": 1.5}, r"initial_link must be a number in \[0, 1\], got 1.5"),
    ({"initial_link": True}, r"initial_link must be a number in \[0, 1\], got True"),
    ({"activation": "Tanh"}, "activation is unknown, got 'Tanh': did you mean 'tanh'"),
    ({"activation": None}, "activation is unknown, got None"),
    ({"objective": "gain"}, "objective is unknown, got 'gain': did you mean 'covariance' or"),
    ({"candidate_bias": "bent"}, "candidate_bias is unknown, got 'bent': did you mean 'bend'"),
    ({"candidates": 0}, "candidates must be a whole number of at least 1, got 0"),
    ({"candidates": 2.0}, "candidates must be a whole number of at least 1, got 2.0"),
    ({"candidates": True}, "candidates must be a whole number of at least 1, got True"),
    ({"candidates": []}, "candidates must not be an empty list"),
    ({"candidates": [4, 0]}, "candidates must be a whole number of at least 1, got 0"),
    ({"candidate_lr": [1e-3, None]}, r"candidate_lr must be a number in \(0, inf\), got None"),
    ({"candidate_lr": 0}, r"candidate_lr must be a number in \(0, inf\), got 0"),
    ({"candidate_lr": -1e-3}, r"candidate_lr must be a number in \(0, inf\), got -0.001"),
    ({"candidate_lr": float("nan")}, r"candidate_lr must be a number in \(0, inf\), got nan"),
    ({"candidate_lr": float("inf")}, r"candidate_lr must be a number in \(0, inf\), got inf"),
    ({"candidate_lr": "1e-3"}, r"candidate_lr must be a number in \(0, inf\), got '1e-3'"),
    ({"measure_every": 1}, "measure_every must be a whole number of at least 2, got 1"),
    ({"priming_batches": -1}, "priming_batches must be a whole number of at least 0, got -1"),
    ({"moment_decay": 1.0}, r"moment_decay must be a number in \[0, 1\), got 1.0"),
    ({"moment_decay": True}, r"moment_decay must be a number in \[0, 1\), got True"),
    ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ({"seed": "0"}, "seed must be a whole number of at least 0, got '0'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_values(settings: dict, message: str):
    with pytest.raises(pbfx.ConfigError, match=f"^pbfx.Config: {message}"):
        pbfx.Config(**settings)


def test_all_faults_come_in_one_message():
    settings = {"include": 3, "learning": "no", "candidates": 0, "moment_decay": 2, "seed": None}
    with pytest.raises(pbfx.ConfigError) as caught:
        pbfx.Config(**settings)
    assert all(f"{name} " in str(caught.value) for name in settings)
    assert str(caught.value).count(";") == len(settings) - 1


@pytest.mark.parametrize(
    "settings",
    [
        {"candidates": 1, "measure_every": 2, "priming_batches": 0, "moment_decay": 0.0, "seed": 0},
        {"candidate_lr": 1e-12, "moment_decay": 0.999999, "seed": 2**40},
        {"include": (), "exclude": ["a", "b"]},
        {"finish": True, "initial_link": 0},
        {"initial_link": 1.0},
        *({"learning": learning} for learning in LEARNING),
        *({"tuning": tuning} for tuning in TUNING),
        *({"objective": objective} for objective in OBJECTIVES),
        *({"candidate_bias": bias} for bias in BIASES),
        *({"activation": activation} for activation in ACTIVATIONS),
    ],
)
def test_values_on_the_edge(settings: dict):
    config = pbfx.Config(**settings)
    assert dataclasses.replace(config) == config


def test_one_glob_needs_no_tuple():
    assert pbfx.Config(include="features.*", exclude="head").include == ("features.*",)
    assert pbfx.Config(exclude=["head", "fc"]).exclude == ("head", "fc")


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pbfx.Config().seed = 3


def test_lists_of_names_agree_with_where_they_come_from():
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)
    assert set(LEARNING) == set(get_args(Learning))
    assert set(TUNING) == set(get_args(Tuning))
    assert set(OBJECTIVES) == set(get_args(Objective))
    assert set(BIASES) == set(get_args(Bias))


def test_json_holds_everything_but_code():
    config = pbfx.Config(include=["a", "b"], filter_fn=lambda module, path: True, seed=3)
    settings = json.loads(json.dumps(config.to_json()))
    assert settings.keys() == {field.name for field in dataclasses.fields(config)} - {"filter_fn"}
    assert pbfx.Config(**settings) == dataclasses.replace(config, filter_fn=None)


def test_settings_of_a_phase_may_be_lists():
    config = pbfx.Config(candidates=[4, 2], candidate_lr=(1e-2, 1e-3, 1e-4))
    assert config.phase(0)[:2] == (4, 1e-2)
    assert config.phase(1)[:2] == (2, 1e-3)
    assert config.phase(9)[:2] == (2, 1e-4)
    assert config.phase(0).measure_every == 4
    assert pbfx.Config(**json.loads(json.dumps(config.to_json()))) == config
    hash(config)
