"""Every name of both dialects is known, checked, and stands where the docs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pbfx import Action, ConfigError, PbfxError, Phase, Situation
from pbfx.compat import globals_perforatedai as GPA
from pbfx.compat import pb_globals as PBG
from pbfx.compat.decisions import DEFAULTS, SWITCH_MODES
from pbfx.compat.places import chosen_modules
from pbfx.compat.settings_table import settings_table
from pbfx.compat.store import Settings
from pbfx.compat.switching import Switching, config_of
from pbfx.compat.table import SETTINGS, Kind

ROOT = Path(__file__).resolve().parents[2]
# What dir(GPA.pc) of perforatedai 3.2.9 lists behind get_.
NAMES = [
    "candidate_weight_init_by_main",
    "candidate_weight_initialization_multiplier",
    "checked_skipped_modules",
    "config_file",
    "configuration_confirmed",
    "confirm_correct_sizes",
    "d_type",
    "dashboard_debug",
    "dashboard_events_enabled",
    "dashboard_url",
    "debugging_output_dimensions",
    "device",
    "dont_give_up_unless_learning_rate_lowered",
    "drawing_extra_graphs",
    "drawing_pai",
    "extra_verbose",
    "find_best_lr",
    "first_fixed_switch_num",
    "fixed_switch_num",
    "global_candidates",
    "history_lookback",
    "improvement_threshold",
    "improvement_threshold_raw",
    "initial_history_after_switches",
    "learn_dendrites_live",
    "library_extra_scores",
    "library_extra_scores_without_graphing",
    "library_validation_score",
    "max_dendrite_tries",
    "max_dendrites",
    "maximizing_score",
    "module_by_name_processing_classes",
    "module_ids_to_perforate",
    "module_ids_to_track",
    "module_names_to_not_save",
    "module_names_to_perforate",
    "module_names_to_track",
    "module_names_with_processing",
    "modules_processing_classes",
    "modules_to_perforate",
    "modules_to_replace",
    "modules_to_track",
    "modules_with_processing",
    "n_epochs_to_switch",
    "no_extra_n_modes",
    "output_dimensions",
    "pai_forward_function",
    "pai_saves",
    "param_vals_setting",
    "parameter_ids_to_track",
    "perforated_backpropagation",
    "replacement_modules",
    "reset_best_score_on_switch",
    "retain_all_dendrites",
    "save_name",
    "save_old_graph_scores",
    "silent",
    "strict_loading",
    "switch_mode",
    "test_saves",
    "testing_dendrite_capacity",
    "unwrapped_modules_confirmed",
    "use_cuda",
    "using_safe_tensors",
    "verbose",
    "weight_decay_accepted",
    "weight_tying_experimental",
]


pytestmark = pytest.mark.usefixtures("script")


def test_the_page_has_the_table_of_the_code():
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert settings_table() in page


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_3x_can_be_read(name: str):
    assert f"set_{name}" in dir(GPA.pc)
    getattr(GPA.pc, f"get_{name}")()


def test_names_are_unique():
    for camel in (False, True):
        names = [
            name
            for setting in SETTINGS
            for name in (setting.camel if camel else (setting.name, *setting.older))
        ]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("camel", [False, True])
def test_every_default_can_be_set(camel: bool):
    settings = Settings(camel)
    for name in settings.names:
        setting = settings.setting(name)
        if setting.honoured:
            settings.set(name, setting.default_in(camel))


def test_both_dialects_set_and_read_in_their_own_way():
    assert PBG.testingDendriteCapacity is True
    PBG.testingDendriteCapacity = False
    PBG.nEpochsToSwitch = 4
    PBG.switchMode = PBG.doingFixedSwitch
    assert (PBG.testingDendriteCapacity, PBG.nEpochsToSwitch, PBG.switchMode) == (False, 4, 2)
    # The other dialect has a store and defaults of its own.
    assert GPA.pc.get_n_epochs_to_switch() == 10
    GPA.pc.set_n_epochs_to_switch(7)
    assert GPA.pc.n_epochs_to_switch == GPA.n_epochs_to_switch == 7
    GPA.testing_dendrite_capacity = False
    assert GPA.pc.get_testing_dendrite_capacity() is False
    assert GPA.pc.get_switch_mode() == GPA.pc.DOING_HISTORY
    PBG.moduleNamesToConvert.append("Block")
    assert PBG.moduleNamesToConvert == ["PBSequential", "Block"]
    GPA.pc.append_module_names_to_perforate(["Block"])
    assert GPA.pc.get_module_names_to_perforate()[-1] == "Block"


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: GPA.pc.set_max_dendrite(3), "max_dendrites"),
        (lambda: GPA.pc.get_n_epoch_to_switch(), "n_epochs_to_switch"),
        (lambda: GPA.pc.append_module_to_track([]), "modules_to_track"),
        (lambda: GPA.pc.improvement_treshold, "improvement_threshold"),
        (lambda: setattr(PBG, "testingDendriteCapacty", False), "testingDendriteCapacity"),
        (lambda: PBG.maxDendrite, "maxDendrites"),
        (lambda: setattr(GPA, "pai_trackr", 1), "pai"),
    ],
)
def test_unknown_names_raise_with_the_nearest(call, hint: str):
    with pytest.raises(PbfxError, match=hint):
        call()
    assert not hasattr(GPA.pc, "set_nothing")
    assert not hasattr(PBG, "nothing")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_epochs_to_switch", 0, "whole number of at least 1"),
        ("n_epochs_to_switch", [5, "x"], "whole number of at least 1"),
        ("improvement_threshold", -0.1, "at least 0"),
        ("improvement_threshold", float("nan"), "at least 0"),
        ("switch_mode", 4, "DOING_HISTORY"),
        ("testing_dendrite_capacity", "yes", "True or False"),
        ("max_dendrites", [], "whole number"),
        ("pai_forward_function", torch.sin, "sigmoid"),
        ("learning", "perforate", "'perforated'"),
        ("module_ids_to_track", [3], "list of strings"),
        ("DOING_HISTORY", 3, "constant"),
    ],
)
def test_values_are_checked_when_they_are_set(name: str, value, said: str):
    with pytest.raises(ConfigError, match=said):
        GPA.pc.__setattr__(name, value)


def test_settings_without_meaning_warn_once_with_the_reason():
    with pytest.warns(UserWarning, match="known from the op") as caught:
        GPA.pc.set_output_dimensions([-1, -1, 0])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    GPA.pc.set_output_dimensions([-1, 0])
    assert GPA.pc.get_output_dimensions() == [-1, 0]
    with pytest.warns(UserWarning, match="inputDimensions"):
        PBG.inputDimensions = [-1, -1, 0]


def test_a_list_is_read_by_the_number_of_dendrites():
    grown = [0]
    settings = Settings(camel=False, dendrites=lambda: grown[0])
    settings.set("n_epochs_to_switch", [9, 5])
    found = []
    for grown[0] in (0, 1, 7):
        found.append(settings.get("n_epochs_to_switch"))
    assert found == [9, 5, 5]


@pytest.mark.parametrize(
    "value",
    [torch.tanh, F.tanh, "tanh", "torch.tanh", nn.Tanh, nn.Tanh()],
)
def test_an_activation_is_known_by_function_module_or_word(value):
    settings = Settings(camel=False)
    settings.set("pai_forward_function", value)
    assert config_of(settings, chosen_modules(nn.Linear(1, 1), settings)).activation == "tanh"


def test_each_dialect_learns_as_its_package_did():
    chosen = chosen_modules(nn.Linear(1, 1), Settings(camel=False))
    for camel, mode in ((False, "gradient"), (True, "perforated")):
        settings = Settings(camel)
        assert config_of(settings, chosen).learning == mode
        settings.set("learning", "sham")
        assert config_of(settings, chosen).learning == "sham"
    settings = Settings(camel=False)
    settings.set("perforated_backpropagation", True)
    assert config_of(settings, chosen).learning == "perforated"


def test_a_file_of_settings_is_taken(tmp_path: Path):
    written = {
        "n_epochs_to_switch": 6,
        "pai_forward_function": "torch.relu",
        "output_dimensions": [-1, 0],
        "DOING_HISTORY": 1,
        "module_settings": {},
        "_customizable_fields": {},
    }
    (tmp_path / "c.json").write_text(json.dumps(written))
    settings = Settings(camel=False)
    settings.load(tmp_path / "c.json")
    assert settings.get("n_epochs_to_switch") == 6
    (tmp_path / "c.json").write_text(json.dumps({"n_epoch_to_switch": 6}))
    with pytest.raises(ConfigError, match="n_epochs_to_switch"):
        settings.load(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="cannot read"):
        settings.load(tmp_path / "none.json")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.up = nn.ConvTranspose1d(4, 4, 1)


def test_lists_of_modules_decide_from_the_outside_in():
    model = nn.ModuleDict({"a": Block(), "b": Block(), "head": nn.Linear(4, 2)})
    settings = Settings(camel=False)
    assert sorted(chosen_modules(model, settings).paths) == ["a.inner", "b.inner", "head"]
    settings.set("module_ids_to_track", [".head"])
    settings.append("modules_to_perforate", [Block])
    settings.append("module_names_to_track", ["Linear"])
    assert sorted(chosen_modules(model, settings).paths) == sorted(
        ["a", "a.inner", "a.up", "b", "b.inner", "b.up"]
    )
    settings.set("module_ids_to_skip", ["b"])
    assert sorted(chosen_modules(model, settings).paths) == ["a", "a.inner", "a.up"]
    chosen = chosen_modules(model, settings)
    assert chosen(model["a"].up, "a.up")
    assert not chosen(model["b"].up, "b.up")


def policy(settings: Settings, **kwargs) -> Switching:
    defaults = {
        "history": lambda: (),
        "rates": lambda: [0.1],
        "scheduled": lambda: False,
        "plain": lambda: False,
    }
    return Switching(settings, **(defaults | kwargs))


def epochs_until_change(settings: Settings, scores: list[float], **situation) -> int:
    chosen = policy(settings)
    for count in range(1, len(scores) + 1):
        now = Situation(Phase.NEURON, tuple(scores[:count]), **situation)
        if chosen.decide(now).action is not Action.CONTINUE:
            return count
    return 0


def real(**values) -> Settings:
    settings = Settings(camel=False)
    settings.set("testing_dendrite_capacity", False)
    for name, value in values.items():
        settings.set(name, value)
    return settings


# What perforatedai 3.2.9 does with the same scores was seen when it was run.
def test_history_mode_waits_as_long_as_its_patience():
    scores = [0.5, 0.6, 0.6, 0.6, 0.7]
    assert epochs_until_change(real(n_epochs_to_switch=2), scores) == 4


def test_patience_starts_after_the_initial_history():
    scores = [0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7]
    settings = real(n_epochs_to_switch=2, initial_history_after_switches=3)
    assert epochs_until_change(settings, scores) == 7


@pytest.mark.parametrize(("first", "wanted"), [(-1, 3), (2, 3), (5, 6)])
def test_fixed_mode_counts_the_first_phase_by_its_own(first: int, wanted: int):
    settings = real(switch_mode=2, fixed_switch_num=3, first_fixed_switch_num=first)
    assert epochs_until_change(settings, [0.1 * i for i in range(9)]) == wanted
    later = {"dendrites": 1, "accepted": 0.0}
    assert epochs_until_change(settings, [0.1 * i for i in range(1, 9)], **later) == 3


def test_never_and_every_time():
    assert epochs_until_change(real(switch_mode=3), [0.5] * 40) == 0
    assert epochs_until_change(real(switch_mode=0), [0.5] * 40) == 1


def test_without_dendrites_training_ends_at_the_first_plateau():
    settings = real(n_epochs_to_switch=2)
    chosen = policy(settings, plain=lambda: True)
    now = Situation(Phase.NEURON, (0.5, 0.5, 0.5))
    assert chosen.decide(now).action is Action.COMPLETE


def test_retained_dendrites_are_not_dropped():
    settings = real(n_epochs_to_switch=1, find_best_lr=False)
    now = Situation(Phase.NEURON, (0.4, 0.4), dendrites=1, accepted=0.5)
    assert policy(settings).decide(now).action is Action.RETRY
    settings.set("retain_all_dendrites", True)
    assert policy(settings).decide(now).action is Action.GROW
    settings.set("max_dendrites", 1)
    decision = policy(settings).decide(now)
    assert decision.action is Action.COMPLETE
    assert decision.keep


def test_both_tables_of_defaults_agree():
    settings = Settings(camel=False)
    for name, value in DEFAULTS.items():
        ours = settings.value(name)
        assert (SWITCH_MODES[ours] if name == "switch_mode" else ours) == value


def test_every_kind_has_words():
    assert all(kind.value for kind in Kind)
