"""The dendrite phase inside the user's unchanged loop: the candidates learn, and nothing else."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pbfx
from learning.loops import (
    Around,
    Cnn,
    Epoch,
    Mlp,
    Task,
    copied,
    enter_dendrite_phase,
    identical,
    images,
    learners,
    network,
    regression,
    relative_error,
    run,
    same,
    sgd,
    train,
)
from pbfx.candidates import Candidates
from pbfx.learning import learner as learner_module
from pbfx_kernels.turns import take_turns

FROZEN = 1e-30
SITES_OF_MLP = ("fc1", "fc2", "head")


def groups(model: nn.Module) -> list[dict[str, object]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": rest, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.1}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=0.1),
    "nesterov, maximize": lambda m: torch.optim.SGD(
        m.parameters(), 1e-3, momentum=0.9, nesterov=True, maximize=True, weight_decay=0.1
    ),
    "adam": lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.1),
    "adam, amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1),
    "adamw, fused": lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1, fused=True),
    "adamw, one by one": lambda m: torch.optim.AdamW(m.parameters(), foreach=False),
    "adamw, named": lambda m: torch.optim.AdamW(m.named_parameters(), weight_decay=0.1),
    "groups": lambda m: torch.optim.AdamW(groups(m), lr=1e-2),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), weight_decay=0.1),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9, weight_decay=0.1),
    "rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), weight_decay=0.1),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), weight_decay=0.1),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), weight_decay=0.1),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), weight_decay=0.1),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), weight_decay=0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "lbfgs, wolfe": lambda m: torch.optim.LBFGS(
        m.parameters(), max_iter=3, line_search_fn="strong_wolfe"
    ),
    "muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-3),
}


def closure_epoch(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)


def zeroed_in_place(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad(set_to_none=False)
        task.loss(model(x), y).backward()
        optimizer.step()


def model_zeroed(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        task.loss(model(x), y).backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)


def clipped_by_norm(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
        optimizer.step()


def clipped_by_value(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()


def accumulated(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for step, (x, y) in enumerate(task.batches()):
        (task.loss(model(x), y) / 2).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def two_forwards(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        half = len(x) // 2
        first, second = task.loss(model(x[:half]), y[:half]), task.loss(model(x[half:]), y[half:])
        (first + second).backward()
        optimizer.step()


def two_backwards(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward(retain_graph=True)
        (0.5 * loss).backward()
        optimizer.step()


def decayed_by_hand(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        penalty = sum(p.pow(2).sum() for p in model.parameters())
        (task.loss(model(x), y) + 1e-4 * penalty).backward()
        optimizer.step()


def scaled(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        scaler.scale(task.loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 256.0


def autocast(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
    model.train()
    for x, y in task.batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(model(x).float(), y)
        loss.backward()
        optimizer.step()


LOOPS: dict[str, Epoch] = {
    loop.__name__: loop
    for loop in (
        train,
        closure_epoch,
        zeroed_in_place,
        model_zeroed,
        clipped_by_norm,
        clipped_by_value,
        accumulated,
        two_forwards,
        two_backwards,
        decayed_by_hand,
        scaled,
        autocast,
    )
}


def candidates_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy what candidates learn with: weights, biases, links, by name."""
    return {
        f"{path}.{name}": parameter.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, Candidates)
        for name, parameter in module.named_parameters()
        if name != "moments"
    }


def check_gradients(model: nn.Module) -> None:
    """Assert that no gradient has reached anything; the moments keep a zero for loss scalers."""
    for name, parameter in model.named_parameters():
        if name.endswith(".moments"):
            assert parameter.grad is None or not parameter.grad.any(), name
        elif parameter.numel():
            assert parameter.grad is None, name


def check_phase(net: nn.Module, model: nn.Module, optimizer: Optimizer, task: Task, loop: Epoch):
    """Train, enter the dendrite phase, train there: the candidates move and the network does not.

    `net` is the user's own module, which shares the parameters and buffers.
    """
    for _ in range(2):
        loop(model, optimizer, task)
    tracker = enter_dendrite_phase(model, optimizer)
    base, plain, pools = network(model), copied(net.state_dict()), candidates_of(model)
    for _ in range(3):
        loop(model, optimizer, task)
        check_gradients(model)
    assert same(network(model), base)
    assert same(copied(net.state_dict()), plain)
    moved = candidates_of(model)
    assert all(not identical(pools[name], moved[name]) for name in pools if pools[name].numel())
    assert all(value.isfinite().all() for value in moved.values())
    return tracker


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_the_network(name: str) -> None:
    torch.manual_seed(0)
    net, task = Cnn(), images(48)
    model = pbfx.transform(net, pbfx.Config(priming_batches=2))
    optimizer = OPTIMIZERS[name](model)
    loop = closure_epoch if name.startswith("lbfgs") else train
    check_phase(net, model, optimizer, task, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_loop_moves_the_network(loop: str) -> None:
    torch.manual_seed(0)
    net, task = Cnn(), images(64)
    model = pbfx.transform(net, pbfx.Config(priming_batches=2))
    check_phase(net, model, sgd(model), task, LOOPS[loop])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_neuron_phase_after_it_trains_the_new_links(name: str) -> None:
    """With every optimizer two dendrites grow, and both links of every site learn."""
    torch.manual_seed(0)
    task = images(48)
    model = pbfx.transform(Cnn(), pbfx.Config(priming_batches=2))
    optimizer = OPTIMIZERS[name](model)
    loop = closure_epoch if name.startswith("lbfgs") else train
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 2), max_dendrites=2)
    for _ in range(9):
        loop(model, optimizer, task)
        tracker.step(0.0)
    assert (tracker.dendrites, tracker.phase) == (2, pbfx.Phase.NEURON)
    for site in ("conv1", "conv2", "head"):
        links = model.get_submodule(f"{site}.dendrites").to_soma
        assert links.shape[0] == 2
        assert links[1].any(), site
        assert links.isfinite().all()


class Siamese(nn.Module):
    """One tower called twice within a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tower(x[:, :3]) - self.tower(x[:, 3:])))


def test_shared_tower_within_a_forward() -> None:
    torch.manual_seed(0)
    net = Siamese()
    model = pbfx.transform(net, pbfx.Config(priming_batches=2))
    tracker = check_phase(net, model, sgd(model), regression(128), train)
    # Three epochs of four batches: every call of a site belongs to the same backward pass.
    assert {learner.batches for learner in learners(tracker).values()} == {12}


def test_moments_of_one_backward_are_those_of_its_forwards() -> None:
    task = regression(64)

    def sums(loop: Callable[[nn.Module], None]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = pbfx.transform(Mlp(), pbfx.Config(candidate_lr=FROZEN, moment_decay=0.0))
        tracker = enter_dendrite_phase(model, sgd(model))
        loop(model)
        return {name: learner.candidates.running for name, learner in learners(tracker).items()}

    def joint(model: nn.Module) -> None:
        first, second = model(task.x[:20]), model(task.x[20:])
        (F.mse_loss(first, task.y[:20]) + F.mse_loss(second, task.y[20:])).backward()

    def one(rows: slice) -> Callable[[nn.Module], None]:
        return lambda model: F.mse_loss(model(task.x[rows]), task.y[rows]).backward()

    together, first, second = sums(joint), sums(one(slice(20))), sums(one(slice(20, None)))
    for name, total in together.items():
        assert relative_error(total, first[name] + second[name]) < 1e-5, name


def test_two_backwards_of_one_forward_measure_twice() -> None:
    task = regression(64)
    model = pbfx.transform(Mlp(), pbfx.Config(measure_every=2, priming_batches=0))
    tracker = enter_dendrite_phase(model, sgd(model))
    loss = task.loss_of(model)
    for _ in range(4):
        loss.backward(retain_graph=True)
    for learner in learners(tracker).values():
        assert learner.batches == 4
        assert float(learner.candidates.heldout_batches) == 2


def test_frozen_parameters_stay_frozen_and_others_learn_again() -> None:
    torch.manual_seed(0)
    net, task = Cnn(), images(48)
    net.conv1.weight.requires_grad_(False)
    net.norm.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    model = pbfx.transform(net, pbfx.Config(priming_batches=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    tracker = check_phase(net, model, optimizer, task, train)
    assert not any(p.requires_grad for p in net.parameters() if p.numel())
    # Conv 1 is frozen, and its candidates learn from the error at its output all the same.
    assert learners(tracker)["conv1"].batches > 0
    while tracker.phase is pbfx.Phase.DENDRITE:
        tracker.step(0.0)
    after = dict(model.named_parameters())
    assert {name: after[name].requires_grad for name in flags} == flags
    assert after["conv1.dendrites.to_soma"].requires_grad


def test_all_frozen_but_the_optimizer_has_a_criterion() -> None:
    """A fully frozen backbone: only dendrites will ever learn."""
    torch.manual_seed(0)
    net, task = Mlp().requires_grad_(False), regression(64)
    model = pbfx.transform(net, pbfx.Config(priming_batches=1))
    scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([scale], 0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 3), max_dendrites=1)
    tracker.step(0.0)
    before = network(model)
    for _ in range(3):
        train(model, optimizer, task)
        assert same(before, network(model)) or tracker.phase is pbfx.Phase.NEURON
        tracker.step(0.0)
    assert tracker.dendrites == 1
    train(model, optimizer, task)
    assert model.fc1.dendrites.to_soma.any()
    assert all(not p.requires_grad for p in net.parameters())


def test_the_base_runs_in_eval_mode_whatever_train_says() -> None:
    torch.manual_seed(0)
    task = images(48)
    model = pbfx.transform(Cnn())
    optimizer = sgd(model)
    train(model, optimizer, task)
    model.eval()
    expected = model(task.x)
    model.train()
    assert not torch.equal(model(task.x), expected), "train mode must differ here"
    enter_dendrite_phase(model, optimizer)
    # Growing restored the best network, which is the one at that call: measure again.
    model.eval()
    expected = model(task.x).detach()
    for _ in range(2):
        model.train()
        assert identical(model(task.x), expected)
    assert model.training


def test_what_lies_outside_the_parts_is_held_too() -> None:
    torch.manual_seed(0)
    task = regression(128)
    model = Around(pbfx.transform(Mlp(outputs=5), pbfx.Config(priming_batches=2)))
    optimizer = sgd(model)
    outside = nn.ModuleList([model.norm, model.last])
    tracker = check_phase(outside, model, optimizer, task, train)
    model.train()
    assert identical(model(task.x), model(task.x)), "dropout outside the part is active"
    while tracker.phase is pbfx.Phase.DENDRITE:
        tracker.step(0.0)
    # And set free again.
    model.train()
    assert not torch.equal(model(task.x), model(task.x))
    assert model.dropout.training
    before = model.norm.running_mean.clone()
    train(model, optimizer, task)
    assert not torch.equal(before, model.norm.running_mean)


def overflowed(position: int) -> tuple[list[set[str]], list[float], nn.Module]:
    """Run batches under a loss scaler, the one at `position` infinite; return what each changed."""
    torch.manual_seed(0)
    net, task = Cnn(), images(64)
    model = pbfx.transform(net, pbfx.Config(priming_batches=4, measure_every=3))
    optimizer = sgd(model)
    tracker = enter_dendrite_phase(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    changes, scales, base = [], [], network(model)
    for batch in range(1, 11):
        before = copied(model.state_dict())
        adam = {
            name: learner.state_dict()["adam"]["state"]
            for name, learner in learners(tracker).items()
        }
        adam_before = {
            name: {i: copied(s) for i, s in state.items()} for name, state in adam.items()
        }
        optimizer.zero_grad()
        loss = task.loss_of(model)
        scaler.scale(loss * torch.inf if batch == position else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = model.state_dict()
        changes.append({n.rpartition(".")[2] for n in after if not identical(before[n], after[n])})
        for name, learner in learners(tracker).items():
            now = learner.state_dict()["adam"]["state"]
            if now.keys() != adam_before[name].keys() or any(
                not same(adam_before[name][i], now[i]) for i in now
            ):
                changes[-1].add("adam")
        scales.append(scaler.get_scale())
    assert same(network(model), base)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return changes, scales, model


@pytest.mark.parametrize("position", [1, 7, 6], ids=["priming", "learning", "measuring"])
def test_an_overflow_leaves_no_trace_and_the_scaler_backs_off(position: int) -> None:
    changes, scales, _ = overflowed(position)
    # What the preactivations were is known before the backward overflows, and is no less true.
    assert changes[position - 1] == ({"count", "mean", "squares"} if position == 1 else set())
    others = [seen for batch, seen in enumerate(changes, 1) if batch != position]
    assert all(seen for seen in others)
    assert sum("adam" in seen for seen in others) >= 3
    assert scales == [1024.0] * (position - 1) + [512.0] * (11 - position)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaler_with_autocast_works_in_both_phases(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, task = Mlp(), regression(64)
    task.batch = 8
    model = pbfx.transform(net, pbfx.Config(priming_batches=2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    # fp16 overflows at first, and the scaler finds its way down.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def epoch(model: nn.Module, optimizer: Optimizer, task: Task) -> None:
        model.train()
        for x, y in task.batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = F.mse_loss(model(x), y.to(dtype))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    check_phase(net, model, optimizer, task, epoch)
    assert (scaler.get_scale() < 2.0**24) == (dtype is torch.float16)


def test_a_backward_that_breaks_off_does_not_put_the_next_out_of_step() -> None:
    task = regression(64)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=0))
    optimizer = sgd(model)
    tracker = enter_dendrite_phase(model, optimizer)
    pool = learners(tracker)["fc2"].candidates

    def interrupt(_: Tensor) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = pool.bias.register_post_accumulate_grad_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        task.loss_of(model).backward()
    before = {name: learner.batches for name, learner in learners(tracker).items()}
    for batch in range(1, 4):
        optimizer.zero_grad()
        task.loss_of(model).backward()
        for name, learner in learners(tracker).items():
            assert learner.batches == before[name] + batch
        check_gradients(model)


class Parts(nn.Module):
    """Two parts with settings of their own, and a branch that is not always taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first = pbfx.transform(Mlp(outputs=4), pbfx.Config(priming_batches=0))
        self.second = pbfx.transform(Mlp(inputs=4), pbfx.Config(priming_batches=1))

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        x = self.first(x)
        return self.second(x) if both else x[:, :1]


def counts(tracker: pbfx.Tracker) -> dict[str, int]:
    return {name: learner.batches for name, learner in learners(tracker).items()}


def test_sites_take_their_turns_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One booking per backward pass and set of rules, of the sites that it has reached."""
    task, model, booked = regression(64), Parts(), []

    def spy(memories, *rest):
        booked.append(len(memories))
        return take_turns(memories, *rest)

    monkeypatch.setattr(learner_module, "take_turns", spy)
    tracker = enter_dendrite_phase(model, sgd(model))
    F.mse_loss(model(task.x), task.y).backward()
    assert booked == [3, 3]
    F.mse_loss(model(task.x, both=False), task.y).backward()
    assert booked == [3, 3, 3]
    found = counts(tracker)
    assert {found[name] for name in found if name.startswith("first")} == {2}
    assert {found[name] for name in found if name.startswith("second")} == {1}
    check_gradients(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    """Reentrant checkpointing runs a backward pass within the backward pass."""
    task, model = regression(64), Parts()
    tracker = enter_dendrite_phase(model, sgd(model))
    x = task.x.clone().requires_grad_()
    inner = checkpoint(model.first, x, use_reentrant=reentrant)
    F.mse_loss(model.second(inner), task.y).backward()
    assert set(counts(tracker).values()) == {1}
    assert set(counts(tracker)) == {f"{p}.{s}" for p in ("first", "second") for s in SITES_OF_MLP}
    check_gradients(model)


def test_what_a_broken_pass_leaves_behind_is_forgotten() -> None:
    task = regression(64)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=0))
    tracker = enter_dendrite_phase(model, sgd(model))
    found = learners(tracker)
    cohort = found["fc1"]._cohort
    assert all(learner._cohort is cohort for learner in found.values())

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    handle = found["fc1"].candidates.weight.register_post_accumulate_grad_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        task.loss_of(model).backward()
    handle.remove()
    assert cohort._reached
    task.loss_of(model).backward()
    assert set(counts(tracker).values()) == {1}
    for learner in found.values():
        learner.detach()
    assert not cohort._reached


def test_a_capture_before_candidates_are_scaled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = images(48)
    model = pbfx.transform(Cnn(), pbfx.Config(priming_batches=6))
    enter_dendrite_phase(model, sgd(model))
    monkeypatch.setattr(learner_module, "is_capturing", lambda _: True)
    message = "scaled after 3 batches, and this is batch 1; run 3 training steps first"
    with pytest.raises(pbfx.errors.RestructureError, match=message):
        task.loss_of(model).backward()
    monkeypatch.undo()
    for _ in range(3):
        task.loss_of(model).backward()
    monkeypatch.setattr(learner_module, "is_capturing", lambda _: True)
    task.loss_of(model).backward()


class Reads(TorchDispatchMode):
    """Count the reads of a value back to the host, and the ops around them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        self.reads += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_hook_waits_for_the_device() -> None:
    task = regression(64)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=0, measure_every=2))
    tracker = enter_dendrite_phase(model, sgd(model))
    for _ in range(4):
        loss = task.loss_of(model)
        with Reads() as seen:
            loss.backward()
        assert seen.ops > 50
        assert seen.reads == 0
    assert learners(tracker)["fc1"].batches == 4


def test_no_error_is_a_warning() -> None:
    model = pbfx.transform(Mlp())
    tracker = enter_dendrite_phase(model, sgd(model))
    with pytest.warns(UserWarning, match=r"no error has reached any candidate.*loss.backward\(\)"):
        tracker.step(0.0)
    regression(64).loss_of(model).backward()
    tracker.step(0.0)
    # Once errors have come, an epoch without any is the user's business.
    tracker.step(0.0)


@pytest.mark.parametrize("site", ["fc1", "head"])
def test_pools_and_hooks_are_freed_after_promotion(site: str) -> None:
    task = regression(64)
    model = pbfx.transform(Mlp(), pbfx.Config(priming_batches=0))
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=3)
    gc.collect()
    parameters = sum(type(o) is nn.Parameter for o in gc.get_objects())
    train(model, optimizer, task)
    tracker.step(0.0)
    learner = learners(tracker)[site]
    pool, moments = weakref.ref(learner.candidates), weakref.ref(learner.candidates.moments)
    watched = weakref.ref(learner)
    del learner
    train(model, optimizer, task)
    assert any(p is moments() for p in optimizer.state)
    tracker.step(0.0)
    gc.collect()
    assert pool() is None
    assert moments() is None
    assert watched() is None
    # Four tensors per grown site are all that is left of it.
    now = sum(type(o) is nn.Parameter for o in gc.get_objects())
    assert now == parameters + 3 * 4
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    # Only what learns is in the optimizer.
    assert len(optimizer.state) == len([p for p in model.parameters() if p.requires_grad]) - 3


def test_training_goes_on_until_the_end(recwarn: pytest.WarningsRecorder) -> None:
    """The whole story with scaler, clipping and accumulation at once, and not one warning."""
    torch.manual_seed(0)
    task = images(48)
    model = pbfx.transform(Cnn())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(2, 2), max_dendrites=2)
    run(model, optimizer, tracker, task)
    assert tracker.complete
    assert tracker.dendrites == 2
    assert not recwarn.list


@pytest.mark.gpu
def test_no_hook_waits_for_a_gpu() -> None:
    task = images(48)
    x, y = task.x.cuda(), task.y.cuda()
    model = pbfx.transform(Cnn().cuda(), pbfx.Config(priming_batches=0, measure_every=2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tracker = enter_dendrite_phase(model, optimizer)
    pool = learners(tracker)["conv1"].candidates
    before = pool.weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    with warnings.catch_warnings():
        # torch warns that the mode itself is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(before, pool.weight)
    tracker.step(0.0)


@pytest.mark.gpu
def test_a_gpu_scaler_backs_off_and_leaves_no_trace() -> None:
    task = images(48)
    x, y = task.x.cuda(), task.y.cuda()
    net = Cnn().cuda()
    model = pbfx.transform(net, pbfx.Config(priming_batches=0, measure_every=9))
    optimizer = torch.optim.AdamW(model.parameters())
    enter_dendrite_phase(model, optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    base, scales = network(model), []
    for batch in range(4):
        before = candidates_of(model)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss * torch.inf if batch == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        # The first batch scales those that join after the norm; the infinite one does nothing.
        assert same(before, candidates_of(model)) == (batch == 2)
    assert scales == [1024.0, 1024.0, 512.0, 512.0]
    assert same(base, network(model))
