"""A pickle is a model of its own: same class, same graph, same numbers, in any process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from models import Case, assert_equal, perceptron, run
from pbfx.kept import kept_modules
from pbfx.parts import parts_of
from pbfx.phase import Phase
from pbfx.plain_graph import graph_of, plain_nodes
from subjects import SUBJECTS, Branch, Coder, bring, each_stage, each_subject, make


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same_model(twin: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Compare everything that a script can see, in both modes; `model` may move on in train."""
    ours, theirs = parts_of(model), parts_of(twin)
    assert ours.keys() == theirs.keys()
    for path, part in ours.items():
        assert theirs[path].code == part.code
        assert theirs[path].structure() == part.structure()
        assert type(theirs[path]).__name__ == type(part).__name__
        assert theirs[path].perforation.tracker is None
        for name in ("sites", "skipped", "path", "rung", "reason", "phase", "draws"):
            assert getattr(theirs[path].perforation, name) == getattr(part.perforation, name)
    assert kept_modules(twin) == kept_modules(model)
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in model.named_modules()]
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert str(pbfx.explain(twin)) == str(pbfx.explain(model))
    for training in (True, False):
        assert_equal(run(twin.train(training), x), run(model.train(training), x))


@each_subject
@each_stage
@pytest.mark.parametrize("way", [through_pickle, through_torch])
def test_a_pickle_is_the_model(case: Case, stage: str, way: Callable[[nn.Module], nn.Module]):
    model = make(case, stage, pbfx.Config(filter_fn=lambda module, path: True))
    twin = way(model)
    assert_same_model(twin, model, case.input())
    # It goes its own way, and on from where the model stood.
    if stage != "dendrite":
        pbfx.grow(twin), pbfx.grow(model)
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_training_is_no_constant_of_a_pickle():
    model = through_pickle(through_pickle(pbfx.transform(SUBJECTS["convolutional"].build())))
    x = SUBJECTS["convolutional"].input()
    assert not torch.equal(*(run(model.train(), x, seed)[0] for seed in (1, 2)))
    assert torch.equal(*(run(model.eval(), x, seed)[0] for seed in (1, 2)))


def test_a_model_around_a_part_is_pickled():
    whole = nn.ModuleDict({"first": pbfx.transform(perceptron()), "second": nn.Linear(3, 3)})
    bring(whole["first"], "grown")
    whole["again"] = whole["first"]
    twin = through_pickle(whole)
    assert twin["again"] is twin["first"]
    assert isinstance(twin["first"], nn.Sequential)
    x = torch.randn(7, 5)
    assert torch.equal(twin.eval()["first"](x), whole.eval()["first"](x))


def test_attributes_that_lead_back_and_bound_methods_survive():
    model = pbfx.transform(SUBJECTS["shared"].build())
    model.get_submodule("first").__dict__["whole"] = model
    twin = through_pickle(model)
    assert twin.get_submodule("first").whole is twin
    assert twin.activate.__self__ is twin
    assert twin.first.note == "a user's own"


class Locked(nn.Module):
    """Holds what no pickle can, and says how to do without."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lock, self.opened = nn.Linear(4, 4), (lambda: None), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock, self.opened = None, self.opened + 1


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
def test_the_users_way_of_being_pickled_is_kept(way: Callable[[nn.Module], nn.Module]):
    twin = way(pbfx.grow(pbfx.transform(Locked())))
    assert (twin.lock, twin.opened) == (None, 1)
    assert twin(torch.randn(2, 4)).shape == (2, 4)


def test_a_tracked_model_is_pickled_in_the_dendrite_phase():
    """What the tracker hangs on the model stays behind, or follows the phase of the copy."""
    torch.manual_seed(0)
    model = pbfx.transform(Coder())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    tracker.step(0.0)
    assert tracker.phase is Phase.DENDRITE
    for twin in (through_pickle(model), copy.deepcopy(model)):
        twin.train()
        x = torch.randn(5, 4)
        assert torch.equal(twin(x), twin(x)), "dropout is at work"
        assert all(not p._post_accumulate_grad_hooks for p in twin.parameters())
        # Freed of its candidates, it is a network like any other.
        free = pbfx.transform(Coder()).state_dict()
        twin.load_state_dict(pbfx.grow(pbfx.transform(Coder())).state_dict() | free)
        assert {p.perforation.phase for p in parts_of(twin).values()} == {Phase.NEURON}
        twin.train()
        assert not torch.equal(twin(x), twin(x))
        pbfx.Tracker(twin, torch.optim.SGD(twin.parameters(), lr=0.1))


def local_class() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    return Net()


class Result:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def halved(x: Tensor) -> Tensor:
    return x / 2


torch.fx.wrap("halved")


class Calling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.gelu(self.fc(halved(x))), 2)
        return torch.relu(torch.ops.aten.add.Tensor(x, x)).to(torch.float64).clamp_(min=0)[:, ::2]

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_functions_travel_by_name():
    model, x = pbfx.transform(Calling()), torch.randn(3, 4)
    assert torch.equal(through_pickle(model)(x), model(x))


def test_a_graph_survives_as_plain_data():
    for case in SUBJECTS.values():
        for part in parts_of(pbfx.transform(case.build())).values():
            source = part.perforation.source
            again = graph_of(pickle.loads(pickle.dumps(plain_nodes(source, "the model"))))
            assert str(again) == str(source)
            assert [n.name for n in again.nodes] == [n.name for n in source.nodes]
            assert [n.target for n in again.nodes] == [n.target for n in source.nodes]


def test_no_path_of_this_machine_is_written():
    data = pickle.dumps(pbfx.transform(SUBJECTS["convolutional"].build()))
    assert __file__.rpartition("/")[0].encode() not in data


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.ModuleList([m]), Branch])
def test_a_local_class_is_named(around: Callable[[nn.Module], nn.Module]):
    model = around(pbfx.transform(local_class()))
    with pytest.raises(
        pbfx.CheckpointError,
        match=r"(?s)perforated Net cannot be pickled.*local_class.<locals>.Net.*pbfx.save",
    ):
        pickle.dumps(model)


def test_a_local_function_is_named_with_the_node_that_calls_it(tmp_path):
    model = pbfx.transform(perceptron())
    (node,) = (n for n in model.perforation.source.nodes if n.op == "output")
    with model.perforation.source.inserting_before(node):
        local = model.perforation.source.call_function(lambda x: x, node.args)
    node.args = (local,)
    model.rebuild()
    for attempt in (
        lambda: pickle.dumps(model),
        lambda: torch.save(nn.ModuleList([model]), tmp_path / "model.pt"),
    ):
        with pytest.raises(pbfx.CheckpointError, match=r"calls .*<lambda>.*top level of a module"):
            attempt()
    assert copy.deepcopy(model)(torch.randn(7, 5)).shape == (7, 3)


def test_a_function_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch):
    data = pickle.dumps(pbfx.transform(Calling()))
    monkeypatch.delitem(globals(), "halved")
    with pytest.raises(pbfx.CheckpointError, match=r"test_pickling\.halved, which is not here"):
        pickle.loads(data)


def test_a_shallow_copy_shares_tensors_and_no_structure():
    case = SUBJECTS["convolutional"]
    model, x = make(case, "grown").eval(), case.input()
    twin = copy.copy(model)
    assert type(twin).__name__ == "Convolutional"
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    before = run(model, x)
    assert_equal(run(twin, x), before)
    pbfx.grow(twin)
    assert (model.structure().dendrites, twin.structure().dendrites) == (2, 3)
    assert_equal(run(model, x), before)


def _work(model: nn.Module, x: Tensor, results) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put((type(model).__name__, float(model(x).sum())))
        model.get_parameter("0.weight").zero_()


def test_a_spawned_process_gets_the_model_and_shares_its_memory():
    case = SUBJECTS["nested"]
    model, x = make(case, "grown").eval().share_memory(), case.input()
    expected = float(model(x).detach().sum())
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_work, args=(model, x, results))
    process.start()
    assert results.get() == ("Sequential", expected)
    process.join(60)
    assert process.exitcode == 0
    assert not model.get_parameter("0.weight").any()
