"""The tracker that scripts for `perforatedai` talk to, over a `pbfx.Tracker` of its own.

Three things differ from the tracker that these scripts were written for, all to the script's good:

- the model that comes back from `add_validation_score` is the one that went in;
- `restructured` is true only when something was;
- `setup_optimizer`, called again with what it was called with before, returns the optimizer and
  the scheduler that live, moments and all; with other arguments a new pair, which the tracker
  adopts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import pbfx
from pbfx import ConfigError, DependencyError, TrackerError
from pbfx.compat.hints import UnknownNameError, narration, nearest
from pbfx.compat.member_vars import MemberVars
from pbfx.compat.owners import tracker_of
from pbfx.compat.run_folder import RunFolder
from pbfx.compat.setup import Setup, make_optimizer, make_scheduler
from pbfx.compat.spelling import camel, snake, spoken_in_camel
from pbfx.compat.store import Settings
from pbfx.compat.switching import TOTAL_EPOCHS, Switching


class ScriptTracker:
    """What `GPA.pai_tracker` and `PBG.pbTracker` are: one per model, made with it.

    Args:
        model: perforated.
        settings: of the script's dialect.
        folder: where the run's files go.
        maximize: whether a larger score is better.
        plain: never grow: `doing_pai=False`.
        drawing: whether to draw the run when it is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        folder: str,
        *,
        maximize: bool = True,
        plain: bool = False,
        drawing: bool = True,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.maximize, self.plain, self.drawing = maximize, plain, drawing
        self.tracker: pbfx.Tracker | None = None
        self.scheduler: Any = None
        self.record: RunFolder | None = None
        self._policy = Switching(
            settings,
            history=lambda: self.history,
            rates=lambda: [float(group["lr"]) for group in self.optimizer.param_groups],
            scheduled=lambda: self.scheduler is not None,
            plain=lambda: self.plain,
        )
        # The classes that were named, and what the living pair was made of.
        self._setup, self._living = Setup(), Setup()
        self._resume: Path | None = None
        self._since = time.perf_counter()
        self._stopped: float | None = None

    @property
    def history(self) -> tuple[pbfx.Epoch, ...]:
        """All epochs so far."""
        return () if self.tracker is None else self.tracker.history

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that lives."""
        return self._ready().optimizer

    @property
    def dendrites(self) -> int:
        """Dendrites per neuron now."""
        return 0 if self.tracker is None else self.tracker.dendrites

    @property
    def member_vars(self) -> MemberVars:
        """The tracker's state under the names that 3.x keeps it by; read only."""
        return MemberVars(self)

    def set_optimizer(self, optimizer: Any) -> None:
        """Choose the class of the optimizer, for `setup_optimizer`."""
        if isinstance(optimizer, Optimizer):
            raise ConfigError(
                "pbfx.compat: set_optimizer takes a class, such as torch.optim.Adam; for an "
                "optimizer that is made already there is set_optimizer_instance"
            )
        self._setup = dataclasses.replace(self._setup, optimizer_class=optimizer)

    def set_scheduler(self, scheduler: Any) -> None:
        """Choose the class of the scheduler, for `setup_optimizer`; None for none."""
        self._setup = dataclasses.replace(self._setup, scheduler_class=scheduler)

    def setup_optimizer(
        self,
        net: nn.Module,
        opt_args: Mapping[str, Any],
        sched_args: Mapping[str, Any] | None = None,
        parameters: Any = None,
    ) -> tuple[Optimizer, Any]:
        """Return an optimizer and a scheduler (or None) that the tracker keeps up to date.

        Args:
            net: the model that was perforated, or a wrapper around it.
            opt_args: arguments of the optimizer's class, `params` among them.
            sched_args: arguments of the scheduler's class but for the optimizer.
            parameters: in place of `params` among the arguments.

        Raises:
            ConfigError: if no class was chosen.
            TrackerError: if the parts do not belong together.
        """
        owner = tracker_of(net)
        wanted = self._setup.asked(opt_args, sched_args)
        if owner.tracker is None or not wanted.same_as(owner._living):
            optimizer = make_optimizer(wanted, net, opt_args, parameters)
            scheduler = make_scheduler(wanted, optimizer, sched_args)
            owner._use(optimizer, scheduler, reset=self.settings.now("param_vals_setting"))
            owner._living = wanted
        return owner.optimizer, owner.scheduler

    def set_optimizer_instance(
        self, optimizer_instance: Optimizer, additional_optimizers: Any = ()
    ) -> None:
        """Name the script's own optimizer, whose scheduler, if any, the script steps.

        After a growth the script may go on with it, or make another and name that.

        Raises:
            ConfigError: if there are several.
            TrackerError: if it holds none of the model's parameters.
        """
        if additional_optimizers:
            raise ConfigError(
                "pbfx.compat: one optimizer steps a perforated model, got "
                f"{1 + len(additional_optimizers)}; give it several parameter groups instead"
            )
        # Rates are the script's business here: its scheduler knows of no growth.
        self._use(optimizer_instance, None, reset=TOTAL_EPOCHS)
        self._living = Setup()

    def clear_optimizer_and_scheduler(self) -> None:
        """Do nothing: the tracker keeps both up to date."""

    def _use(self, optimizer: Optimizer, scheduler: Any, *, reset: int) -> None:
        if self.tracker is not None:
            self.tracker.adopt(optimizer, scheduler)
            self.tracker.reset_learning_rate = reset != TOTAL_EPOCHS
            self.scheduler = scheduler
            return
        saving = self.settings.now("test_saves")
        tracker = pbfx.Tracker(
            self.model,
            optimizer,
            scheduler,
            policy=self._policy,
            max_dendrites=self.settings.now("max_dendrites"),
            maximize=self.maximize,
            reset_learning_rate=reset != TOTAL_EPOCHS,
            directory=self.folder if saving else None,
        )
        record = RunFolder(self.folder, self.maximize)
        if self._resume is not None:
            pbfx.load(self._resume, self.model, tracker)
            record.read(len(tracker.history))
        self.tracker, self.record, self.scheduler = tracker, record, scheduler
        self._resume = None
        self._since = time.perf_counter()

    def add_validation_score(
        self, accuracy: Any, net: nn.Module, force_switch: bool | str = False, *more: Any
    ) -> tuple[nn.Module, bool, bool]:
        """Take in the score of an epoch; perhaps restructure.

        Args:
            accuracy: a finite number, or a tensor with one element.
            net: the model that was perforated, or a wrapper around it.
            force_switch: whether to restructure now, whatever the settings say. The name of the
                run, which the oldest scripts give here, is ignored.
            more: where such scripts have it.

        Returns:
            `net` itself, whether it was restructured, and whether training is complete.

        Raises:
            ConfigError: if the two were exchanged.
            TrackerError: if there is no optimizer yet, or `net` is another model.
            ScoreError: if the score is not a finite number.
        """
        if isinstance(accuracy, nn.Module) and not isinstance(net, nn.Module):
            raise ConfigError(
                "pbfx.compat: the score comes first: model, restructured, complete = "
                "tracker.add_validation_score(score, model)"
            )
        owner = tracker_of(net)
        if owner is not self:
            return owner.add_validation_score(accuracy, net, force_switch, *more)
        tracker = self._ready()
        if tracker.complete:
            return net, False, True
        forced = more[0] if more else force_switch
        self._policy.forced = forced is True
        before = tracker.dendrites
        step = tracker.step(accuracy)
        self._close_epoch()
        self._narrate(step, before)
        if step.complete:
            self._finish()
        return net, step.restructured, step.complete

    def add_extra_score(self, score: Any, extra_score_name: str) -> None:
        """Record another score of this epoch, for the tables and the picture."""
        self._recorded().pending[str(extra_score_name)] = float(score)

    def add_extra_score_without_graphing(self, score: Any, extra_score_name: str) -> None:
        """Record another score of this epoch."""
        self.add_extra_score(score, extra_score_name)

    def add_test_score(self, score: Any, extra_score_name: str) -> None:
        """Record the test score of this epoch; nothing is decided by it."""
        self.add_extra_score(score, extra_score_name)

    def add_loss(self, loss: Any) -> None:
        """Record the training loss of this epoch."""
        self.add_extra_score(loss, "training_loss")

    def add_learning_rate(self, learning_rate: Any) -> None:
        """Do nothing: the rates are read from the optimizer."""

    def start_epoch(self, internal_call: bool = False) -> None:
        """Start the clock of an epoch; without it, time runs from one score to the next."""
        self._since, self._stopped = time.perf_counter(), None

    def stop_epoch(self, internal_call: bool = False) -> None:
        """Stop the clock of an epoch before its score comes in."""
        self._stopped = time.perf_counter()

    def _close_epoch(self) -> None:
        record, now = self._recorded(), time.perf_counter()
        record.close_epoch((self._stopped or now) - self._since)
        record.write(self.history, self.settings.now("history_lookback"))
        self._since, self._stopped = time.perf_counter(), None

    def _finish(self) -> None:
        """Leave what a person looks for when a run is over: the best network and a picture."""
        if not self.settings.now("test_saves"):
            self.save(Path(self.folder) / "best.safetensors", with_run=False)
        if self.drawing and self.settings.now("drawing_pai"):
            try:
                self.save_graphs()
            except DependencyError as error:
                narration.info("%s", error)

    def save_graphs(self, extra_string: str = "") -> None:
        """Draw the run into its folder.

        Raises:
            DependencyError: if matplotlib is not installed.
        """
        lookback = self.settings.now("history_lookback")
        title = f"{Path(self.folder).name}{extra_string}"
        self._recorded().draw(self.history, lookback, title)

    def save_tracker_settings(self) -> None:
        """Do nothing: files of a tracker hold all that it needs."""

    def save(self, path: Path, *, with_run: bool = True) -> None:
        """Write the model, and the run so far if there is an optimizer."""
        pbfx.save(self.model, path, self.tracker if with_run else None)

    def load(self, path: Path, resume: bool) -> None:
        """Load the network of a file; with `resume`, the run goes on once there is an optimizer."""
        if self.tracker is not None and resume:
            pbfx.load(path, self.model, self.tracker)
            self._recorded().read(len(self.history))
            return
        pbfx.load(path, self.model)
        self._resume = path if resume else None

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Say what `perforate_model` says, after `convert_network`: how the oldest scripts do it.

        Args:
            args: perhaps the model; then `doing_pai`, `save_name`, `making_graphs` and
                `maximizing_score`.
            kwargs: the same by name.

        Raises:
            TrackerError: if training has begun.
        """
        if self.tracker is not None:
            raise TrackerError("pbfx.compat: the tracker is at work; initialize it before training")
        given = args[1:] if args and isinstance(args[0], nn.Module) else args
        names = ("doing_pai", "save_name", "making_graphs", "maximizing_score")
        said = dict(zip(names, given, strict=False))
        # Spelled alike in both dialects, so its arguments come in either.
        said |= {snake(name): value for name, value in kwargs.items()}
        self.folder = said.get("save_name") or self.folder
        self.maximize = bool(said.get("maximizing_score", self.maximize))
        self.plain = not said.get("doing_pai", not self.plain)
        self.drawing = bool(said.get("making_graphs", self.drawing))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _CAMEL:
            own = getattr(self, _CAMEL[name])
            return spoken_in_camel(own) if callable(own) else own
        known = [own for own in dir(type(self)) if not own.startswith("_")]
        raise UnknownNameError(
            f"pbfx.compat: the tracker has no {name!r}; {nearest(name, [*known, *_CAMEL])}"
        )

    def _ready(self) -> pbfx.Tracker:
        if self.tracker is None:
            raise TrackerError(
                "pbfx.compat: the tracker knows no optimizer yet; call setup_optimizer "
                "(setupOptimizer) or set_optimizer_instance (setOptimizerInstance) first"
            )
        return self.tracker

    def _recorded(self) -> RunFolder:
        if self.record is None:
            self._ready()
        assert self.record is not None
        return self.record

    def _narrate(self, step: pbfx.Step, before: int) -> None:
        if self.settings.now("silent"):
            return
        talkative = self.settings.now("verbose") or self.settings.now("extra_verbose")
        if step.restructured or talkative:
            narration.info("epoch %d: %s", len(self.history) - 1, step.reason)
        if not step.complete:
            return
        if self._policy.testing:
            narration.info(
                "added %d dendrites to every neuron (%d to %d parameters) and found no problems; "
                "set %s to False for the real run",
                before,
                self.history[0].parameters,
                self.history[-1].parameters,
                self._name_of("testing_dendrite_capacity"),
            )
        else:
            best = self._ready().best_score
            narration.info(
                "training is complete at %d dendrites, best score %.6g; the model holds the best "
                "network, and so does %s",
                step.dendrites,
                float("nan") if best is None else best,
                Path(self.folder) / "best.safetensors",
            )

    def _name_of(self, canonical: str) -> str:
        return next(n for n in self.settings.names if self.settings.setting(n).name == canonical)


# The tutorial's spelling of everything that a script can call.
_CAMEL = {camel(name): name for name in dir(ScriptTracker) if not name.startswith("_")}
