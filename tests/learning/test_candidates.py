"""Candidates learn: on data they have not seen, by the oracle of autograd on the plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pbfx
from learning.loops import (
    Cnn,
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
    same,
    sgd,
    train,
)
from pbfx.learning import SiteLearner

# A rate so small that no candidate changes a bit: learning batches then do all but learn.
FROZEN = 1e-30


def errors_of(net: nn.Module, task: Task) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each site's input and the error at its output, by hooks on the plain network."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            caught[name] = (inputs[0], output)

        return hook

    sites = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    handles = [module.register_forward_hook(catch(name)) for name, module in sites.items()]
    net.eval()
    x = task.x.clone().requires_grad_()
    task.loss(net(x), task.y).backward()
    for handle in handles:
        handle.remove()
    return {name: (x.detach(), y.grad) for name, (x, y) in caught.items()}


def activations_of(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return tanh of what candidates with these weights compute, as (C, P, N)."""
    stack = []
    for row in range(len(weight)):
        twin = copy.deepcopy(module)
        twin.weight.data.copy_(weight[row])
        if bias is not None:
            twin.bias.data.copy_(bias[row])
        stack.append(rows_of(twin(x).tanh()))
    return torch.stack(stack).detach()


def rows_of(y: Tensor) -> Tensor:
    """Return (P, N)."""
    return y if y.dim() == 2 else y.movedim(1, -1).flatten(0, -2)


def covariance(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return |Cov| and |corr| (C, N) of activations (C, P, N) and errors (P, N)."""
    a, g = a.double(), g.double()
    da, dg = a - a.mean(1, keepdim=True), g - g.mean(0)
    found = (da * dg).mean(1).abs()
    return found, found / (da.std(1, correction=0) * dg.std(0, correction=0))


@pytest.fixture(scope="module", params=["regression", "images"])
def learnt(request: pytest.FixtureRequest) -> dict[str, dict[str, Tensor]]:
    """Train a network and then its candidates; return |Cov| on fresh data, before and after."""
    torch.manual_seed(0)
    if request.param == "regression":
        net, task, unseen = Mlp(), regression(512), [regression(512, seed=s) for s in range(1, 9)]
    else:
        net, task, unseen = (
            Cnn(),
            images(384, signal=0.6),
            [images(384, signal=0.6, seed=s) for s in range(1, 9)],
        )
    model = pbfx.transform(net, pbfx.Config(candidate_lr=3e-3, seed=1))
    optimizer = sgd(model)
    for _ in range(15 if request.param == "regression" else 1):
        train(model, optimizer, task)
    tracker = enter_dendrite_phase(model, optimizer)
    found = learners(tracker)
    pools = {name: learner.candidates for name, learner in found.items()}
    before = {name: copied(dict(pool.named_parameters())) for name, pool in pools.items()}
    for _ in range(25):
        train(model, optimizer, task)
        tracker.step(0.0)
    result = {}
    errors = [errors_of(net, other) for other in unseen]
    for name, pool in pools.items():
        module = net.get_submodule(name)
        rows = {}
        for when, values in (("random", before[name]), ("learnt", dict(pool.named_parameters()))):
            measured = [
                covariance(
                    activations_of(module, e[name][0], values["weight"], values.get("bias")),
                    rows_of(e[name][1]),
                )
                for e in errors
            ]
            # (batch, C, N)
            stacked = [torch.stack(values) for values in zip(*measured, strict=True)]
            rows[f"{when} cov"], rows[f"{when} corr"] = stacked
        result[name] = rows
    return result


@pytest.mark.parametrize("measure", ["cov", "corr"])
def test_learning_raises_it_on_data_not_learnt_from(
    learnt: dict[str, dict[str, Tensor]], measure: str
) -> None:
    for name, rows in learnt.items():
        random, trained = rows[f"random {measure}"], rows[f"learnt {measure}"]
        gain = (trained - random).mean((1, 2))
        # Eight fresh data sets; measured: 10 to 40 standard errors at every site.
        assert gain.mean() > 6 * gain.std() / len(gain) ** 0.5, (name, gain)


def test_the_mean_learnt_candidate_beats_the_best_random_one(
    learnt: dict[str, dict[str, Tensor]],
) -> None:
    for name, rows in learnt.items():
        best_random = rows["random cov"].mean(0).amax(0)
        mean_learnt = rows["learnt cov"].mean((0, 1))
        assert mean_learnt.mean() > 2 * best_random.mean(), name


def pool_of(tracker: pbfx.Tracker, site: str) -> SiteLearner:
    return learners(tracker)[site]


def started(
    task: Task, model: nn.Module | None = None, warm_up: int = 2, **settings: object
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, pbfx.Tracker]:
    """Return a plain network, its transformed twin in the dendrite phase, optimizer and tracker."""
    torch.manual_seed(0)
    net = Mlp() if model is None else model
    model = pbfx.transform(net, pbfx.Config(**settings))
    optimizer = sgd(model)
    for _ in range(warm_up):
        train(model, optimizer, task)
    return net, model, optimizer, enter_dendrite_phase(model, optimizer)


def backward(model: nn.Module, task: Task) -> None:
    task.loss_of(model).backward()


def test_batches_take_turns_and_measuring_never_steps() -> None:
    task = regression(64)
    _, model, _, tracker = started(task, measure_every=3, priming_batches=2)
    pool = pool_of(tracker, "fc1").candidates
    for batch in range(1, 13):
        before = copied(pool.state_dict())
        backward(model, task)
        after = copied(pool.state_dict())
        changed = {name for name in before if not identical(before[name], after[name])}
        learning = {"weight", "bias"}
        if batch % 3 == 0:
            assert changed == {"heldout", "heldout_batches"}, batch
        elif batch <= 2:
            # Priming: the moments only.
            assert changed <= {"running", "running_batches", "direction", "error_mean"}, batch
            assert "running" in changed
        else:
            assert learning | {"running"} <= changed, batch
            assert not changed & {"heldout", "heldout_batches"}, batch


def test_running_moments_decay_and_heldout_ones_do_not() -> None:
    task = regression(64)
    settings = {"candidate_lr": FROZEN, "measure_every": 2, "moment_decay": 0.5}
    _, model, _, tracker = started(task, **settings)
    pool = pool_of(tracker, "head").candidates
    for _ in range(6):
        backward(model, task)
    # Three learning batches and three measuring ones, all of the same data.
    one = pool.heldout / 3
    assert float(pool.heldout_batches) == 3
    assert relative_error(pool.running, one * (1 + 0.5 + 0.25)) < 1e-5


def test_measured_correlation_is_that_of_the_plain_network() -> None:
    task = regression(64)
    net, model, _, tracker = started(task, candidate_lr=FROZEN, measure_every=2)
    errors = errors_of(net, task)
    for _ in range(2):
        backward(model, task)
    scores = []
    for name, learner in learners(tracker).items():
        pool, (x, g) = learner.candidates, errors[name]
        a = activations_of(net.get_submodule(name), x, pool.weight, pool.bias)
        learner.measure()
        oracle = covariance(a, g)[1]
        assert relative_error(pool.best_score, oracle.float()) < 1e-4, name
        scores.append(float(oracle.amax(0).mean()))
    # What a policy sees: the mean over sites of the mean over neurons of the pool's best.
    _, model, _, tracker = started(task, candidate_lr=FROZEN, measure_every=2)
    for _ in range(2):
        backward(model, task)
    tracker.step(0.0)
    assert tracker.history[-1].candidate_score == pytest.approx(sum(scores) / 3, rel=1e-4)


def test_each_neuron_gets_the_best_of_its_pool() -> None:
    task = regression(64)
    net, model, _, tracker = started(task, candidate_lr=FROZEN, measure_every=2, candidates=7)
    errors = errors_of(net, task)
    for _ in range(2):
        backward(model, task)
    winners = set()
    for name, learner in learners(tracker).items():
        pool, (x, g) = learner.candidates, errors[name]
        best = covariance(activations_of(net.get_submodule(name), x, pool.weight, pool.bias), g)[1]
        learner.measure()
        weight, bias, links = learner.chosen()
        for neuron, winner in enumerate(best.argmax(0).tolist()):
            assert identical(weight[neuron], pool.weight[winner, neuron])
            assert identical(bias[neuron], pool.bias[winner, neuron])
            winners.add(winner)
        assert links.shape == (0, len(weight))
    assert len(winners) > 3, "the winners must differ for this test to say anything"


def test_the_best_candidate_of_any_epoch_is_kept() -> None:
    """A candidate that was better in an earlier epoch is promoted as it was then."""
    task = regression(64)
    _, model, _, tracker = started(task, measure_every=2, priming_batches=0, candidate_lr=0.05)
    learner = pool_of(tracker, "fc2")
    pool, seen = learner.candidates, []
    for _ in range(8):
        for _ in range(4):
            backward(model, task)
        score = pbfx.learning.statistics(pool.heldout).correlation.abs()
        seen.append((score.clone(), pool.weight.detach().clone()))
        learner.measure()
    scores = torch.stack([score for score, _ in seen])
    weights = torch.stack([weight for _, weight in seen])
    best = scores.amax((0, 1))
    chosen = learner.chosen()[0]
    at = set()
    for neuron in range(len(best)):
        epoch, row = divmod(int(scores[:, :, neuron].argmax()), scores.shape[1])
        assert identical(chosen[neuron], weights[epoch, row, neuron])
        at.add(epoch)
    assert at != {len(seen) - 1}, "all were best at the end: nothing was kept from before"


def test_nothing_measured_means_the_first_candidate() -> None:
    task = regression(64)
    _, model, _, tracker = started(task, candidates=3)
    learner = pool_of(tracker, "fc1")
    first = learner.candidates.weight[0].detach().clone()
    backward(model, task)
    assert learner.measure() is None
    assert identical(learner.chosen()[0], first)


def promoted(
    task: Task, learning_rate: float, epochs: int, rounds: int = 1
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model fresh from a promotion, and what each new dendrite was predicted to bring."""
    torch.manual_seed(0)
    net = Mlp().double()
    model = pbfx.transform(net, pbfx.Config(candidate_lr=learning_rate, measure_every=4))
    optimizer = sgd(model)
    for _ in range(5):
        train(model, optimizer, task)
    # Whole-data batches, four an epoch: the last one measures, and what it measured is what stands
    # there when the epoch ends.
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, epochs), max_dendrites=9)
    for _ in range(rounds):
        tracker.step(0.0)
        slopes = {}
        found = learners(tracker)
        model.train()
        while tracker.phase is pbfx.Phase.DENDRITE:
            for _ in range(4):
                backward(model, task)
            tracker.step(0.0)
        slopes = {name: learner.prospects()[1] for name, learner in found.items()}
    assert tracker.dendrites == rounds
    return model, slopes


def double(task: Task) -> Task:
    return Task(task.x.double(), task.y.double(), task.loss, task.batch)


@pytest.mark.parametrize(
    ("learning_rate", "epochs", "rounds"),
    [(FROZEN, 1, 1), (1e-2, 12, 1), (1e-2, 6, 3)],
    ids=["random", "learnt", "third"],
)
def test_predicted_gain_is_the_measured_one(learning_rate: float, epochs: int, rounds: int) -> None:
    task = double(regression(128))
    model, slopes = promoted(task, learning_rate, epochs, rounds)
    before = task.loss_of(model)
    before.backward()
    for name, slope in slopes.items():
        gradient = model.get_submodule(f"{name}.dendrites").to_soma.grad[-1]
        assert relative_error(slope, gradient) < 1e-6, name
    # The first step of plain gradient descent on the new links alone.
    epsilon = 1e-3
    with torch.no_grad():
        for name, slope in slopes.items():
            model.get_submodule(f"{name}.dendrites").to_soma[-1] -= epsilon * slope
        drop = float(before - task.loss_of(model))
    predicted = epsilon * sum(float((slope**2).sum()) for slope in slopes.values())
    assert predicted > 0
    # What is left over is of second order in epsilon.
    assert drop == pytest.approx(predicted, rel=0.01)


def test_learnt_candidates_promise_more_than_random_ones() -> None:
    task = double(regression(128))
    gains = [
        sum(float((slope**2).sum()) for slope in promoted(task, rate, 12)[1].values())
        for rate in (FROZEN, 1e-2)
    ]
    assert gains[1] > 2 * gains[0]


def grown(seed: int, global_seed: int = 0) -> tuple[dict[str, Tensor], pbfx.Tracker]:
    torch.manual_seed(0)
    model = pbfx.transform(Cnn(), pbfx.Config(seed=seed))
    optimizer, task = sgd(model), images(48)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 2), max_dendrites=2)
    torch.manual_seed(global_seed)
    for _ in range(6):
        train(model, optimizer, task)
        tracker.step(task.score(model))
    assert tracker.dendrites == 2
    return copied(model.state_dict()), tracker


def test_two_runs_are_equal_bit_for_bit() -> None:
    (first, tracker), (second, twin) = grown(seed=0), grown(seed=0)
    assert same(first, second)
    assert tracker.history == twin.history


def test_the_seed_draws_the_candidates_and_nothing_else_does() -> None:
    def drawn(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = pbfx.transform(Cnn(), pbfx.Config(seed=seed))
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        tracker = enter_dendrite_phase(model, sgd(model))
        assert torch.equal(before, torch.get_rng_state()), "growing drew from torch's stream"
        return {name: learner.candidates.weight for name, learner in learners(tracker).items()}

    reference = drawn(0, 0)
    assert same(reference, drawn(0, 5))
    other = drawn(1, 0)
    assert not any(identical(reference[name], other[name]) for name in reference)
    # No two sites and no two candidates share a draw.
    assert not identical(reference["conv1"][0], reference["conv1"][1])


def test_each_pool_is_drawn_anew() -> None:
    torch.manual_seed(0)
    model = pbfx.transform(Mlp())
    tracker = pbfx.Tracker(model, sgd(model), policy=pbfx.Interval(1, 1), max_dendrites=2)
    pools = []
    for _ in range(2):
        tracker.step(0.0)
        pools.append(pool_of(tracker, "fc1").candidates.weight.detach().clone())
        with pytest.warns(UserWarning, match="no error has reached any candidate"):
            tracker.step(0.0)
    assert not identical(*pools)
    assert network(model)["fc1.dendrites.weight"].shape[0] == 2


def test_a_small_batch_counts_by_its_size() -> None:
    task = regression(64)
    _, model, _, tracker = started(task, measure_every=9, priming_batches=4, moment_decay=0.0)
    learner = pool_of(tracker, "fc1")
    weight, raw = learner.candidates.weight, []
    weight.register_hook(raw.append)
    for _ in range(5):
        backward(model, task)
    before = learner.state_dict()["adam"]["state"][0]["exp_avg"].clone()
    backward(model, Task(task.x[:16], task.y[:16], task.loss))
    after = learner.state_dict()["adam"]["state"][0]["exp_avg"]
    assert relative_error(after - 0.9 * before, 0.1 * raw[-1] * 16 / 64) < 1e-5
