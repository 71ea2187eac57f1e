"""Every setting of `perforatedai`, in both dialects, and where it went: data and nothing else.

Names and defaults are those that `perforatedai` 3.2.9 (snake_case) and 1.1.0 (camelCase, the
tutorial of 2025) answer with when asked; `docs/migrating.md` prints this table.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Kind(enum.Enum):
    """What values a setting takes; all but lists may also be a list by number of dendrites."""

    FLAG = "True or False"
    WHOLE = "a whole number of at least 1"
    COUNT = "a whole number of at least 0"
    INTEGER = "a whole number"
    NUMBER = "a finite number of at least 0"
    MODE = (
        "a switch mode: DOING_SWITCH_EVERY_TIME, DOING_HISTORY, DOING_FIXED_SWITCH, DOING_NO_SWITCH"
    )
    ACTIVATION = (
        "torch.sigmoid, torch.tanh, torch.relu, F.gelu, F.silu, or one of these as a string"
    )
    LEARNING = "'perforated', 'gradient' or 'sham', or None"
    TEXT = "a string"
    NAMES = "a list of strings"
    CLASSES = "a list of classes or functions"
    ANYTHING = "anything"


LISTS = frozenset((Kind.NAMES, Kind.CLASSES))
_SAME: Any = object()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: in the 3.x dialect; names that only the tutorial's dialect had are spelled alike here.
        default: in the 3.x dialect.
        kind: the values that it takes.
        went: where its meaning lives in pbfx, or why it has none. Markdown, one sentence.
        camel: its names in the tutorial's dialect, the usual one first.
        older: other spellings of snake_case, of versions before 3.2.9.
        camel_default: in the tutorial's dialect, where it differs.
        honoured: whether it does anything.
    """

    name: str
    default: Any
    kind: Kind
    went: str
    camel: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    camel_default: Any = _SAME
    honoured: bool = True

    def default_in(self, camel: bool) -> Any:
        """Return the default of one of the dialects, a fresh object."""
        value = self.camel_default if camel and self.camel_default is not _SAME else self.default
        return list(value) if isinstance(value, list) else value


def _none(went: str, *rows: tuple[str, Any, str] | tuple[str, Any]) -> Iterator[Setting]:
    """Yield settings that do nothing, all for one reason: name, default, tutorial's name."""
    for name, default, *camel in rows:
        yield Setting(name, default, Kind.ANYTHING, went, tuple(camel), honoured=False)


_LAYERS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear]
_PLACE = "`pbfx.Config(include=, exclude=, filter_fn=)`"
_TRACKED = f"{_PLACE}: trained as ever, no dendrites"

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "testing_dendrite_capacity",
        True,
        Kind.FLAG,
        "`pbfx.Tracker(policy=pbfx.EveryTime(), max_dendrites=3)`",
        ("testingDendriteCapacity", "testingDendriteCapactity"),
    ),
    Setting(
        "switch_mode",
        1,
        Kind.MODE,
        "the policy: history is `pbfx.Plateau`, fixed `pbfx.Plateau(max_epochs=)`, every time the "
        "same with 1, none `pbfx.Never`; `pbfx.Interval` and `pbfx.EveryTime` judge nothing",
        ("switchMode",),
    ),
    Setting(
        "n_epochs_to_switch", 10, Kind.WHOLE, "`pbfx.Plateau(patience=)`", ("nEpochsToSwitch",)
    ),
    Setting("history_lookback", 1, Kind.WHOLE, "`pbfx.Plateau(smoothing=)`", ("historyLookback",)),
    Setting(
        "initial_history_after_switches",
        0,
        Kind.COUNT,
        "`pbfx.Plateau(grace=)`, which counts from the start of the phase: this number plus the "
        "patience",
        ("initialHistoryAfterSwitches",),
    ),
    Setting(
        "fixed_switch_num",
        250,
        Kind.WHOLE,
        "`pbfx.Plateau(max_epochs=)`, or `pbfx.Interval` where no set should be dropped",
        ("fixedSwitchNum",),
    ),
    Setting(
        "first_fixed_switch_num",
        -1,
        Kind.INTEGER,
        "the first entry of `pbfx.Plateau(max_epochs=[first, rest])`",
        ("firstFixedSwitchNum",),
        camel_default=249,
    ),
    Setting(
        "improvement_threshold",
        [1e-3, 1e-4, 0.0],
        Kind.NUMBER,
        "`pbfx.Plateau(relative_threshold=)`",
        ("improvementThreshold",),
        camel_default=5e-4,
    ),
    Setting(
        "improvement_threshold_raw",
        1e-5,
        Kind.NUMBER,
        "`pbfx.Plateau(absolute_threshold=)`",
        ("improvementThresholdRaw",),
    ),
    Setting("max_dendrites", 100, Kind.COUNT, "`pbfx.Tracker(max_dendrites=)`", ("maxDendrites",)),
    Setting(
        "max_dendrite_tries",
        2,
        Kind.WHOLE,
        "`pbfx.Plateau(tries=)`",
        ("maxDendriteTries",),
        camel_default=5,
    ),
    Setting(
        "retain_all_dendrites",
        False,
        Kind.FLAG,
        "`pbfx.Interval`, which drops nothing",
        ("retainAllPB",),
    ),
    Setting(
        "maximizing_score",
        True,
        Kind.FLAG,
        "`pbfx.Tracker(maximize=)`",
    ),
    Setting(
        "find_best_lr",
        True,
        Kind.FLAG,
        "`pbfx.Tracker(reset_learning_rate=)`: rate and schedule start again after a growth, and "
        "no epochs are spent on a search",
        ("findBestLR",),
    ),
    Setting(
        "dont_give_up_unless_learning_rate_lowered",
        True,
        Kind.FLAG,
        "a policy of your own; after a growth, and with `find_best_lr`, a plateau waits until the "
        "schedule has lowered the rate",
        ("dontGiveUpUnlessLearningRateLowered",),
    ),
    Setting(
        "param_vals_setting",
        1,
        Kind.COUNT,
        "`pbfx.Tracker(reset_learning_rate=)`: false for PARAM_VALS_BY_TOTAL_EPOCH",
        ("paramValsSetting",),
    ),
    Setting(
        "pai_forward_function",
        torch.sigmoid,
        Kind.ACTIVATION,
        '`pbfx.Config(activation="sigmoid")`',
        ("PBForwardFunction",),
        ("pb_forward_function",),
    ),
    Setting(
        "perforated_backpropagation",
        False,
        Kind.FLAG,
        '`pbfx.Config(learning="perforated")`, built in; false is `"gradient"`',
        ("doingPerforated",),
        camel_default=True,
    ),
    Setting(
        "learning",
        None,
        Kind.LEARNING,
        "`pbfx.Config(learning=)`; new in pbfx, it overrules `perforated_backpropagation`",
        ("learning",),
    ),
    Setting(
        "global_candidates",
        1,
        Kind.WHOLE,
        "`pbfx.Config(candidates=)`; if never set, pbfx's own pool of 4",
        ("globalCandidates",),
    ),
    Setting(
        "p_epochs_to_switch",
        10,
        Kind.WHOLE,
        "`pbfx.Plateau(candidate_patience=)`; if never set, pbfx's own 2",
        ("pEpochsToSwitch",),
    ),
    Setting(
        "cap_at_n",
        False,
        Kind.FLAG,
        "`pbfx.Plateau(max_candidate_epochs=)`: no dendrite phase outlasts the neuron phase before",
        ("capAtN",),
    ),
    Setting(
        "module_names_to_perforate",
        ["PAISequential", "Conv1d", "Conv2d", "Conv3d", "Linear"],
        Kind.NAMES,
        f"{_PLACE}, by class name",
        ("moduleNamesToConvert",),
        ("module_names_to_convert",),
        camel_default=["PBSequential"],
    ),
    Setting(
        "modules_to_perforate",
        [],
        Kind.CLASSES,
        f"{_PLACE}, by class",
        ("modulesToConvert",),
        ("modules_to_convert",),
        camel_default=_LAYERS,
    ),
    Setting(
        "module_ids_to_perforate",
        [],
        Kind.NAMES,
        f"{_PLACE}, by path",
        ("moduleIDsToConvert",),
        ("module_ids_to_convert",),
    ),
    Setting("module_names_to_track", [], Kind.NAMES, _TRACKED, ("moduleNamesToTrack",)),
    Setting("modules_to_track", [], Kind.CLASSES, _TRACKED, ("modulesToTrack",)),
    Setting("module_ids_to_track", [], Kind.NAMES, _TRACKED, ("moduleIDsToTrack",)),
    Setting("modules_to_skip", [], Kind.CLASSES, _TRACKED, ("modulestoSkip", "modulesToSkip")),
    Setting("module_names_to_skip", [], Kind.NAMES, _TRACKED, ("moduleNamesToSkip",)),
    Setting("module_ids_to_skip", [], Kind.NAMES, _TRACKED, ("moduleIDsToSkip",)),
    Setting(
        "modules_to_replace",
        [],
        Kind.CLASSES,
        "your own code, before `pbfx.transform`",
        ("modulesToReplace",),
    ),
    Setting(
        "replacement_modules",
        [],
        Kind.CLASSES,
        "your own code, before `pbfx.transform`",
        ("replacementModules",),
    ),
    Setting("save_name", "", Kind.TEXT, "`pbfx.Tracker(directory=)`", ("saveName",)),
    Setting(
        "test_saves",
        True,
        Kind.FLAG,
        "`pbfx.Tracker(directory=)`; if false, no file is written before the end",
        ("testSaves",),
    ),
    Setting(
        "drawing_pai",
        True,
        Kind.FLAG,
        "the plot of the run folder: drawn once, at the end, and when asked for",
        ("drawingPB",),
    ),
    Setting("silent", False, Kind.FLAG, "the logging level of `pbfx.compat`", ("silent",)),
    Setting("verbose", False, Kind.FLAG, "the logging level of `pbfx.compat`", ("verbose",)),
    Setting(
        "extra_verbose", False, Kind.FLAG, "the logging level of `pbfx.compat`", ("extraVerbose",)
    ),
    *_none(
        "which axis holds the neurons is known from the op",
        ("output_dimensions", [-1, 0, -1, -1], "outputDimensions"),
        ("input_dimensions", [-1, 0, -1, -1], "inputDimensions"),
        ("debugging_output_dimensions", 0, "debuggingOutputDimensions"),
        ("debugging_input_dimensions", 0, "debuggingInputDimensions"),
        ("confirm_correct_sizes", False, "confirmCorrectSizes"),
    ),
    *_none(
        "the graph shows where a layer's output goes, so processors have nothing to do",
        ("modules_with_processing", [], "modulesWithProcessing"),
        ("modules_processing_classes", [], "moduleProcessingClasses"),
        ("module_names_with_processing", [], "moduleNamesWithProcessing"),
        ("module_by_name_processing_classes", [], "moduleByNameProcessingClasses"),
    ),
    *_none(
        "pbfx asks for no confirmation",
        ("configuration_confirmed", False),
        ("unwrapped_modules_confirmed", False, "unwrappedModulesConfirmed"),
        ("weight_decay_accepted", True, "weightDecayAccepted"),
        ("checked_skipped_modules", False, "checkedSkippedLayers"),
    ),
    *_none(
        "dendrites live where their neuron lives, in its dtype",
        ("device", torch.device("cpu"), "device"),
        ("use_cuda", False, "use_cuda"),
        ("d_type", torch.float32, "dType"),
    ),
    *_none(
        "candidates are drawn as torch draws the layer itself, and start with a link of zero",
        (
            "candidate_weight_initialization_multiplier",
            0.01,
            "candidateWeightInitializationMultiplier",
        ),
        ("candidate_weight_init_by_main", False),
        ("default_random_pai_to_candidates", False, "defaultRandomPBtoCandidates"),
    ),
    *_none(
        "each phase is judged by its own best score, and a set of dendrites by the best network "
        "before it",
        ("reset_best_score_on_switch", True, "resetBestScoreOnSwitch"),
    ),
    *_none(
        "files hold tensors and JSON, tied weights included, and are never unpickled",
        ("using_safe_tensors", True, "usingSafeTensors"),
        ("strict_loading", True),
        ("pai_saves", False, "paiSaves"),
        ("module_names_to_not_save", [".base_model"], "moduleNamesToNotSave"),
        ("weight_tying_experimental", False),
        ("save_all_epochs", False, "saveAllEpochs"),
    ),
    *_none(
        "what is no linear or conv layer is trained as ever without being listed",
        ("parameter_ids_to_track", []),
    ),
    *_none(
        "the run folder keeps every epoch, and one picture is drawn of all of them",
        ("drawing_extra_graphs", True),
        ("save_old_graph_scores", True, "saveOldGraphScores"),
        ("candidate_graph_mode", True, "candidateGraphMode"),
        ("dendrite_graph_mode", True, "dendriteGraphMode"),
    ),
    *_none(
        "pbfx talks to no dashboard",
        ("dashboard_debug", False),
        ("dashboard_events_enabled", False),
        ("dashboard_url", "http://localhost:3002"),
    ),
    *_none(
        "call `add_validation_score` in the training loop or in a callback of the library",
        ("library_validation_score", ""),
        ("library_extra_scores", []),
        ("library_extra_scores_without_graphing", []),
    ),
    *_none("give it to `perforate_model(config_file=)`", ("config_file", None)),
    *_none(
        "candidates learn pbfx's way, and stop on batches that they did not learn from "
        "(`docs/learning.md`)",
        ("learn_dendrites_live", False, "learnPBLive"),
        ("no_extra_n_modes", True, "noExtraNModes"),
        ("pai_improvement_threshold", 0.1, "pbImprovementThreshold"),
        ("pai_improvement_threshold_raw", 1e-5, "pbImprovementThresholdRaw"),
        ("initial_correlation_batches", 100, "initialCorrelationBatches"),
        ("correlations_by_mean", False, "correlationsByMean"),
        ("formula_type", 0, "formulaType"),
        ("grad_sum_first", True, "gradSumFirst"),
        ("dendrite_learn_mode", True, "dendriteLearnMode"),
        ("dendrite_update_mode", False, "dendriteUpdateMode"),
        ("default_pai_batch", False, "defaultPBBatch"),
        ("default_pai_dropout", 0.0, "defaultPbDropout"),
        ("doing_dropout_for_small", True, "doingDropoutForSmall"),
        ("doing_dropout_for_small_input", False, "doingDropoutForSmallInput"),
        ("internal_batch_norm", False, "internalBatchNorm"),
        ("doing_thing", 0, "doingThing"),
        ("variable_p", 142, "variableP"),
        ("no_backward_workaround", False, "noBackwardWorkaround"),
        ("debugging_memory_leak", True, "debuggingMemoryLeak"),
    ),
    *_none(
        "whoever steps the scheduler goes on doing so; only the scores decide when to grow",
        ("switch_on_lr_change", False, "switchOnLRChange"),
        ("scheduler_patience", 3, "schedulerPatience"),
        ("scheduler_eps", 1e-15, "schedulerEps"),
    ),
    *_none(
        "pbfx counts what is computed with, candidates not included",
        ("count_training_params", False, "countTrainingParams"),
    ),
)

# What settings are compared with; not to be set.
CONSTANTS = {
    "DOING_SWITCH_EVERY_TIME": 0,
    "DOING_HISTORY": 1,
    "DOING_FIXED_SWITCH": 2,
    "DOING_NO_SWITCH": 3,
    "PARAM_VALS_BY_TOTAL_EPOCH": 0,
    "PARAM_VALS_BY_UPDATE_EPOCH": 1,
    "PARAM_VALS_BY_NEURON_EPOCH_START": 2,
}
CAMEL_CONSTANTS = {
    "doingSwitchEveryTime": 0,
    "doingMeanBest": 0,
    "doingHistory": 1,
    "doingFixedSwitch": 2,
    "doingNoSwitch": 3,
    "paramValsByTotalEpoch": 0,
    "paramValsByUpdateEpoch": 1,
    "paramValsByNormalEpochStart": 2,
    "sigmoidMode": "sigmoid",
    "reluMode": "relu",
    "tanHMode": "tanh",
}
