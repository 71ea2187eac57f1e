"""A restructuring that fails leaves everything as it was; a later one succeeds."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pbfx
from learning.loops import Mlp, equal, identical, regression
from pbfx import Action, Decision, RestructureError, pipeline, snapshot
from pbfx.candidates import Candidates
from pbfx.dendrites import Dendrites
from pbfx.derived import DerivedGraphs
from pbfx.perforated import PerforatedModule

TASK = regression(96)


class Broken(Exception):
    pass


class Scripted:
    def __init__(self, *actions: str) -> None:
        self.actions = list(actions)

    def decide(self, situation: pbfx.Situation) -> Decision:
        action, _, flag = self.actions[0].partition(" ")
        return Decision(Action(action), "told so", keep=flag != "drop")


class Run:
    """A model with everything that could be left half changed, and a record of all of it."""

    def __init__(self, *actions: str, learning: str = "perforated") -> None:
        torch.manual_seed(0)
        net = Mlp()
        net.fc2.bias.requires_grad_(False)
        self.model = pbfx.transform(net, pbfx.Config(learning=learning, priming_batches=1))
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.rate = torch.tensor(0.01)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [(n, p) for n, p in named if n.endswith("weight")], "lr": self.rate},
                {"params": [(n, p) for n, p in named if n.endswith("bias")], "lr": 0.02},
            ]
        )
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.ConstantLR(self.optimizer, 0.5, 2),
                torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9),
            ],
            [2],
        )
        self.policy = Scripted(*actions)
        self.tracker = pbfx.Tracker(self.model, self.optimizer, self.scheduler, policy=self.policy)
        while len(self.policy.actions) > 1:
            self.epoch()
            self.tracker.step(0.0)
            self.policy.actions.pop(0)
            if self.policy.actions[0] != "promote":
                # So that the best epoch is not the last one.
                self.policy.actions.insert(0, "continue")
                for score in (0.0, -1.0):
                    self.epoch()
                    self.tracker.step(score)
                self.policy.actions.pop(0)
        self.epoch()

    def epoch(self) -> None:
        self.model.train()
        self.model.fc1.eval()
        for _ in range(4):
            self.optimizer.zero_grad()
            TASK.loss_of(self.model).backward()
            self.optimizer.step()
        # Half of an accumulated gradient is there when the restructuring begins.
        TASK.loss_of(self.model).backward()

    def record(self) -> dict[str, Any]:
        """Return objects (by identity) and values of all that the user can see."""
        model, optimizer = self.model, self.optimizer
        named = dict(model.named_parameters())
        states = {id(s): s for s in self.schedulers()}
        return {
            # An epoch's measurement is closed by the score, before anything can fail.
            "values": {
                n: t.detach().clone()
                for n, t in model.state_dict().items()
                if ".candidates.heldout" not in n and ".candidates.best_" not in n
            },
            "objects": {n: id(t) for n, t in model.state_dict(keep_vars=True).items()},
            "order": list(model.state_dict()),
            "modules": {n: (id(m), m.training) for n, m in model.named_modules()},
            "learns": {n: p.requires_grad for n, p in named.items()},
            "grads": {n: p.grad if p.grad is None else p.grad.clone() for n, p in named.items()},
            "code": model.code,
            "graph": [(node.op, str(node.target)) for node in model.graph.nodes],
            "phase": model.perforation.phase,
            "draws": model.perforation.draws,
            "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
            "groups": [(id(g), id(g["params"])) for g in optimizer.param_groups],
            "held": [[id(p) for p in g["params"]] for g in optimizer.param_groups],
            "settings": [
                {k: copy.deepcopy(v) for k, v in g.items() if k != "params"}
                for g in optimizer.param_groups
            ],
            "rate": (id(optimizer.param_groups[0]["lr"]), float(self.rate)),
            "state": {
                id(p): {k: v.clone() for k, v in state.items()}
                for p, state in optimizer.state.items()
            },
            "state objects": {
                (id(p), k): id(v) for p, s in optimizer.state.items() for k, v in s.items()
            },
            "scheduler": {
                key: copy.deepcopy({k: v for k, v in vars(s).items() if k in CHECKED})
                for key, s in states.items()
            },
            "listening": {
                name: learner.batches for name, learner in self.tracker._learners.items()
            },
        }

    def schedulers(self) -> Iterator[Any]:
        yield self.scheduler
        yield from self.scheduler._schedulers


CHECKED = ("last_epoch", "_step_count", "_last_lr", "base_lrs", "_milestones", "factor", "gamma")


@contextmanager
def failing_pass(_: Run) -> Iterator[None]:
    """Let the last pass raise, when the modules have been changed already."""

    def hold_eval(gm: Any, ctx: Any) -> int:
        raise Broken

    with pytest.MonkeyPatch.context() as patch:
        passes = (*pipeline.PASSES[:-1], hold_eval)
        run_passes = pipeline.run_passes
        patch.setattr("pbfx.perforated.run_passes", lambda gm, ctx: run_passes(gm, ctx, passes))
        # The passes do not run over what has been derived before.
        patch.setattr("pbfx.derived.DerivedGraphs.take_up", lambda *_: None)
        yield


@contextmanager
def failing_scheduler(run: Run) -> Iterator[None]:
    """Half of the new schedule is in place when it raises."""

    def load(state: dict[str, Any]) -> None:
        run.scheduler.last_epoch = 77
        run.scheduler._schedulers[1].last_epoch = 77
        run.scheduler._schedulers[1]._last_lr[0] = 77.0
        run.optimizer.param_groups[1]["lr"] = 77.0
        run.rate.fill_(77.0)
        raise Broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.scheduler, "load_state_dict", load)
        yield


class Unreadable(collections.defaultdict):
    def pop(self, *_: Any) -> Any:
        raise Broken

    def get(self, *_: Any) -> Any:
        raise Broken


@contextmanager
def failing_state(run: Run) -> Iterator[None]:
    """The optimizer's state cannot be moved."""
    state = run.optimizer.state
    run.optimizer.state = Unreadable(dict, state)
    yield
    assert type(run.optimizer.state) is Unreadable
    run.optimizer.state = state


def failing_call(owner: Any, name: str, successes: int) -> Callable[[Run], Any]:
    """Let a method, or a function of a module, work so many times; the next call raises when it has
    done its work."""

    @contextmanager
    def broken(_: Run) -> Iterator[None]:
        calls, method = [], getattr(owner, name)

        def raising(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            calls.append(name)
            if len(calls) > successes:
                raise Broken
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, raising)
            yield

    return broken


@contextmanager
def interrupted(_: Run) -> Iterator[None]:
    """Ctrl-C, in the middle."""
    calls = []
    resized = Dendrites._resized

    def raising(self: Dendrites, count: int) -> None:
        resized(self, count)
        calls.append(count)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dendrites, "_resized", raising)
        yield


SCRIPTS = {
    "first growth": ("grow",),
    "first promotion": ("grow", "promote"),
    "second growth": ("grow", "promote", "grow"),
    "second promotion": ("grow", "promote", "grow", "promote"),
    "rollback": ("grow", "promote", "retry drop"),
    "completion": ("grow", "promote", "complete drop"),
}
CASES = [
    pytest.param(script, fault, id=f"{script}: {name}")
    for faults, scripts in (
        ({"a pass": failing_pass}, list(SCRIPTS)),
        (
            {"a graph of before": failing_call(DerivedGraphs, "take_up", 0)},
            list(SCRIPTS),
        ),
        ({"a scheduler": failing_scheduler}, [s for s in SCRIPTS if s != "completion"]),
        (
            {"an optimizer's state": failing_state},
            ["first promotion", "second promotion", "rollback", "completion"],
        ),
        (
            {"Dendrites.append": failing_call(Dendrites, "append", 1)},
            ["first promotion", "second promotion"],
        ),
        (
            {"Candidates": failing_call(Candidates, "__init__", 2)},
            ["first growth", "second growth", "rollback"],
        ),
        (
            {"loading the best weights": failing_call(snapshot, "copy_into", 0)},
            ["first growth", "second growth", "rollback", "completion"],
        ),
        (
            {"a rebuild": failing_call(PerforatedModule, "rebuild", 0)},
            list(SCRIPTS),
        ),
        ({"Ctrl-C": interrupted}, ["first promotion", "second promotion"]),
    )
    for name, fault in faults.items()
    for script in scripts
]


@pytest.mark.parametrize(("script", "fault"), CASES)
def test_a_failure_leaves_all_as_it_was(script: str, fault: Callable[[Run], Any]) -> None:
    run = Run(*SCRIPTS[script])
    before = run.record()
    epochs = len(run.tracker.history)
    expected = KeyboardInterrupt if fault is interrupted else RestructureError
    with fault(run), pytest.raises(expected) as error:
        run.tracker.step(-2.0)
    after = run.record()
    for part in before:
        assert equal(before[part], after[part]), part
    if expected is RestructureError:
        assert "restructuring failed and was undone: " in str(error.value)
        assert "Broken" in str(error.value)
        assert error.value.__cause__ is not None
    assert len(run.tracker.history) == epochs + 1
    # The same epoch again, as if nothing had been; it must end where a run without fault ends.
    step = run.tracker.step(-2.0)
    assert step.restructured
    reference = Run(*SCRIPTS[script])
    reference.tracker.step(-2.0)
    run.epoch()
    reference.epoch()
    values, wanted = run.model.state_dict(), reference.model.state_dict()
    assert values.keys() == wanted.keys()
    assert all(identical(values[name], wanted[name]) for name in values)
    assert run.model.code == reference.model.code


@pytest.mark.parametrize(
    "fault", [failing_pass, failing_call(Dendrites, "append", 1), failing_scheduler]
)
def test_a_failure_in_gradient_mode(fault: Callable[[Run], Any]) -> None:
    run = Run("grow", "grow", learning="gradient")
    before = run.record()
    with fault(run), pytest.raises(RestructureError):
        run.tracker.step(-2.0)
    after = run.record()
    for part in before:
        assert equal(before[part], after[part]), part
    assert run.tracker.step(-2.0).dendrites == 2


def test_growing_by_hand_is_all_or_nothing() -> None:
    torch.manual_seed(0)
    model = pbfx.grow(pbfx.transform(Mlp()))
    before = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    code, draws = model.code, model.perforation.draws
    with (
        failing_call(Dendrites, "append", 1)(None),
        pytest.raises(RestructureError, match="restructuring failed and was undone: Broken"),
    ):
        pbfx.grow(model, 2)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert (model.code, model.perforation.draws) == (code, draws)
    pbfx.grow(model, 2)
    assert model.fc1.dendrites.count == 3


def test_an_optimizer_that_lost_a_group_is_put_back() -> None:
    """Even the list of groups is restored, whatever replaced it."""
    run = Run("grow")
    before = run.record()
    groups = run.optimizer.param_groups

    def load(_: dict[str, Any]) -> None:
        run.optimizer.param_groups = [dict(g, lr=5.0) for g in run.optimizer.param_groups]
        run.optimizer.param_groups.pop()
        groups.reverse()
        raise Broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.scheduler, "load_state_dict", load)
        with pytest.raises(RestructureError):
            run.tracker.step(-2.0)
    assert run.optimizer.param_groups is groups
    after = run.record()
    for part in before:
        assert equal(before[part], after[part]), part


def test_a_model_that_loads_in_its_own_way_does_so_when_it_returns_to_its_best() -> None:
    run = Run("continue", "grow")
    loaded = []
    run.model.fc1.register_load_state_dict_post_hook(lambda *_: loaded.append("fc1"))
    best = {name: t.clone() for name, t in run.tracker._run.current.tensors.items()}
    assert not identical(best["fc1.weight"], run.model.fc1.weight)
    assert run.tracker.step(-2.0).restructured
    assert loaded == ["fc1"]
    assert all(identical(run.model.state_dict()[name], value) for name, value in best.items())
