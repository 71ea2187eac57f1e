"""A model that goes through its phases again takes up the graphs that it had, where it may."""

import copy
import pickle

import torch
from torch import nn

import pbfx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.fc(x))))


def nodes(model: pbfx.PerforatedModule) -> list[str]:
    return [str(node.target) for node in model.graph.nodes]


def test_another_dendrite_takes_the_graph_up_under_new_code():
    model, x = pbfx.transform(Net()).eval(), torch.randn(5, 4)
    wanted = model(x)
    pbfx.grow(model)
    graph, code, records = model.graph, model.forward.__code__, model.perforation.records
    pbfx.grow(model)
    assert model.graph is graph
    assert model.perforation.records is records
    assert model.forward.__code__ is not code
    assert torch.equal(model(x), wanted)
    assert model.grown()["fc"].count == 2


def test_phases_come_back_with_their_graphs():
    model = pbfx.transform(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=3)
    seen: dict[pbfx.Phase, list[object]] = {phase: [] for phase in pbfx.Phase}
    codes: dict[pbfx.Phase, set[str]] = {phase: set() for phase in pbfx.Phase}
    while not tracker.complete:
        if tracker.dendrites or tracker.phase is pbfx.Phase.DENDRITE:
            seen[tracker.phase].append(model.graph)
            codes[tracker.phase].add(model.code)
        model.train()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tracker.step(float(len(tracker.history)))
    for phase in pbfx.Phase:
        assert len(seen[phase]) > 1
        assert all(graph is seen[phase][0] for graph in seen[phase])
        assert len(codes[phase]) == 1
    assert codes[pbfx.Phase.NEURON] != codes[pbfx.Phase.DENDRITE]


def test_a_graph_that_someone_has_edited_is_not_taken_up():
    model = pbfx.grow(pbfx.transform(Net()))
    before = nodes(model)
    edited = model.graph
    (relu,) = (node for node in edited.nodes if node.target is torch.relu)
    relu.target = torch.tanh
    model.recompile()
    pbfx.grow(model)
    assert model.graph is not edited
    assert nodes(model) == before


def test_what_a_pass_reads_of_a_layer_counts():
    """A dropout with a hook has to go on firing in the dendrite phase; without one it is held."""
    model = pbfx.transform(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=3)
    tracker.step(0.0)
    assert "1" not in nodes(model)
    model(torch.randn(5, 4)).sum().backward()
    tracker.step(0.0)
    model.get_submodule("1").register_forward_hook(lambda *_: None)
    tracker.step(1.0)
    assert tracker.phase is pbfx.Phase.DENDRITE
    assert "1" in nodes(model)


def test_copies_and_pickles_derive_their_own():
    model = pbfx.grow(pbfx.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    x = torch.randn(3, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.perforation.graphs is not model.perforation.graphs
        graph = twin.graph
        pbfx.grow(twin)
        assert twin.graph is graph
        assert twin.graph is not model.graph
        assert torch.equal(twin(x), model(x))
