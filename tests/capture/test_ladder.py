"""Models that no single graph can hold: which rung each part takes, and that nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pbfx
from models import Branch, Coder, randomise
from pbfx.kept import kept_modules
from pbfx.parts import candidate_parameters, parts_of
from pbfx.phase import Phase


def rungs(model: nn.Module) -> dict[str, str]:
    return {path: str(part.perforation.rung) for path, part in parts_of(model).items()}


def same(model: nn.Module, other: nn.Module, *inputs: Tensor) -> None:
    for training in (True, False):
        torch.manual_seed(0)
        expected = copy.deepcopy(model).train(training)(*inputs)
        torch.manual_seed(0)
        assert torch.equal(copy.deepcopy(other).train(training)(*inputs), expected)


def test_methods_live_on_and_see_the_dendrites():
    model, x = Coder(), torch.randn(5, 4)
    ours = pbfx.transform(model)
    assert type(ours) is Coder
    assert ours.note is model.note
    assert rungs(ours) == {"down": "submodule", "up": "op"}
    assert "offers more than forward (decode, encode)" in kept_modules(ours)[""].reason
    assert isinstance(ours.up, nn.Linear)
    assert ours.up.weight is model.up.weight
    assert (ours.up.in_features, ours.up.out_features) == (2, 4)
    same(model, ours, x)
    assert torch.equal(ours.encode(x), model.encode(x))
    randomise(pbfx.grow(ours))
    assert not torch.equal(ours.encode(x), model.encode(x))
    assert torch.equal(ours.decode(ours.encode(x)), ours(x))
    assert {"up.dendrites.weight", "down.0.dendrites.to_soma"} <= ours.state_dict().keys()
    assert set(model.state_dict()) < set(ours.state_dict())


def test_a_class_of_one_graph_keeps_its_class():
    class Net(nn.Sequential):
        kind = "net"

        @property
        def width(self) -> int:
            return self[0].out_features

    model = Net(nn.Linear(4, 3))
    ours = pbfx.transform(model)
    assert isinstance(ours, Net)
    assert isinstance(ours, pbfx.PerforatedModule)
    assert (ours.kind, ours.width, rungs(ours)) == ("net", 3, {"": "whole"})
    assert isinstance(copy.deepcopy(ours), Net)


def test_what_cannot_be_traced_is_called_by_the_graph_around_it():
    model = nn.Sequential(
        nn.Linear(4, 4),
        Branch(nn.Linear(4, 4)),
        nn.Sequential(Branch(nn.Sequential(nn.Linear(4, 4)))),
    )
    ours = pbfx.transform(model)
    assert rungs(ours) == {"": "whole", "1.inner": "op", "2.0.inner": "submodule"}
    assert [n.target for n in ours.graph.nodes if n.op == "call_module"] == ["0", "1", "2.0"]
    assert "shapes of its inputs" in kept_modules(ours)["1"].reason
    same(model, ours, torch.randn(3, 4))
    same(model, ours, torch.randn(2, 3, 4))
    assert list(dict(ours.named_modules())) == list(dict(model.named_modules()))


def test_a_layer_of_two_graphs_is_a_part_of_its_own():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["a"](x) + self.inner["b"](x) if x.dim() else x

    ours, x = pbfx.transform(Both()), torch.randn(3, 4)
    assert rungs(ours) == {"inner.a.0": "op"}
    assert ours.inner["a"][0] is ours.inner["b"][0]
    same(Both(), ours, x)
    randomise(pbfx.grow(ours))
    layer = ours.inner["a"][0]
    assert torch.equal(ours(x), layer(x).relu() + layer(x))


def test_every_op_draws_dendrites_of_its_own():
    ours = pbfx.grow(pbfx.transform(nn.ModuleList([Branch(nn.Linear(4, 4)) for _ in range(2)])))
    one, other = (layer.inner.dendrites.weight for layer in ours)
    assert not torch.equal(one, other)


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Named(dict):
    pass


class Asking(nn.Module):
    def __init__(self, question) -> None:
        super().__init__()
        self.fc, self.question = nn.Linear(4, 4), question
        self.inner = Branch(nn.Linear(4, 4))
        self.attend = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.question(self, x)


def asks_the_type(self, x):
    return self.fc(x) if isinstance(x, Tensor) else x


def asks_whether_it_is_a_tensor(self, x):
    return self.fc(x) if torch.is_tensor(x) else x


def asks_for_an_attribute(self, x):
    return self.fc(x.logits) if hasattr(x, "logits") else self.fc(x)


def asks_for_the_length(self, x):
    return self.fc(x) * len(x)


def asks_whether_a_result_is_none(self, x):
    y, weights = self.attend(x, x, x, need_weights=False)
    return self.fc(y if weights is None else x)


def asks_whether_gradients_are_on(self, x):
    return self.fc(x) if torch.is_grad_enabled() else x


def reads_the_dtype_of_its_parameters(self, x):
    return self.fc(x.to(next(self.parameters()).dtype))


def saves_memory(self, x):
    return checkpoint(self.fc, x, use_reentrant=False)


def takes_anything(self, x, **options):
    return self.fc(x) * len(options)


def returns_a_dict_of_its_own(self, x):
    return Named(y=self.fc(x))["y"]


def assigns_by_index(self, x):
    y = self.fc(x)
    y[0] = 0
    return y


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (asks_the_type, r"asks for the type of 'x'.*asks_the_type \(line \d+\)"),
        (asks_whether_it_is_a_tensor, "asks for the type of 'x'.*asks_whether_it_is_a_tensor"),
        (asks_for_an_attribute, "has an attribute 'logits'"),
        (asks_for_the_length, "symbolic tracing.*len"),
        (asks_whether_a_result_is_none, r"compares something with None and calls 'attend'"),
        (asks_whether_gradients_are_on, r"asks torch.is_grad_enabled\(\)"),
        (reads_the_dtype_of_its_parameters, r"reads in bulk \(self.parameters\(\)\)"),
        (saves_memory, "inside torch.utils.checkpoint"),
        (assigns_by_index, "symbolic tracing.*item assignment"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_questions_that_a_graph_cannot_ask_again(question, message: str):
    model = Asking(question)
    ours = pbfx.transform(model)
    assert re.search(f"(?s)Asking.*{message}", kept_modules(ours)[""].reason)
    assert rungs(ours) == {"fc": "op", "inner.inner": "op"}
    same(model, ours, torch.randn(3, 4))


def test_questions_about_other_things_are_fine():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.width = nn.Linear(4, 4), 4

        def forward(self, x):
            assert isinstance(self.width, int)
            if hasattr(self, "missing") or self.fc.bias is None:
                return x
            batch, _ = x.shape
            return self.fc(x.view(batch, 4)) + torch.arange(4, device=x.device)

    assert rungs(pbfx.transform(Net())) == {"": "whole"}


@pytest.mark.parametrize("kind", [Named, Output])
def test_outputs_of_a_class_of_their_own(kind: type):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return kind(logits=self.fc(x))

    model, x = Net(), torch.randn(2, 4)
    out = pbfx.transform(model)(x)
    assert type(out) is kind
    logits = out["logits"] if kind is Named else out.logits
    assert torch.equal(logits, model.fc(x))


def test_the_dendrite_phase_holds_every_part():
    """Whatever the loop says about modes, kept forwards and their layers run in eval."""
    torch.manual_seed(0)
    model = pbfx.transform(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Branch(nn.Linear(4, 4)), nn.Linear(4, 2))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 2), max_dendrites=1)
    x, y = torch.randn(64, 4), torch.randint(2, (64,))
    tracker.step(0.0)
    assert tracker.phase is Phase.DENDRITE
    state = {k: v.clone() for k, v in model.state_dict().items() if "dendrites" not in k}
    pools = {name: p.detach().clone() for name, p in candidate_parameters(model).items()}
    model.train()
    model[2].drop.train()
    expected = None
    for _ in range(20):
        optimizer.zero_grad()
        out = model(x)
        expected = out.detach() if expected is None else expected
        assert torch.equal(out, expected), "dropout is at work"
        F.cross_entropy(out, y).backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert {"0", "2.inner", "3"} == {name.partition(".dendrites")[0] for name in pools}
    assert all(
        not torch.equal(p, pools[name])
        for name, p in candidate_parameters(model).items()
        if name.endswith("weight")
    )
    tracker.step(0.0)
    tracker.step(0.0)
    assert tracker.phase is Phase.NEURON
    assert tracker.dendrites == 1
    assert model[2].drop.training
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))


def test_a_model_of_parts_is_saved_and_loaded(tmp_path):
    ours, x = randomised(pbfx.transform(Coder())), torch.randn(5, 4)
    pbfx.save(ours, tmp_path / "coder.safetensors")
    for fresh in (Coder(), pbfx.transform(Coder())):
        again = pbfx.load(tmp_path / "coder.safetensors", fresh)
        assert torch.equal(again.encode(x), ours.encode(x))
        assert torch.equal(again(x), ours(x))
    fresh = pbfx.transform(Coder())
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), ours(x))


def randomised(model: nn.Module) -> nn.Module:
    randomise(pbfx.grow(model, 2))
    return model


def test_patterns_see_the_paths_of_the_whole_model():
    chosen = pbfx.transform(Coder(), pbfx.Config(include="down.*", exclude="down.2"))
    assert rungs(chosen) == {"down": "submodule"}
    assert [site.name for site in chosen.down.perforation.sites] == ["0"]
    seen = []
    pbfx.transform(Coder(), pbfx.Config(filter_fn=lambda module, path: seen.append(path) or True))
    assert seen == ["down.0", "down.2", "up"]
    with pytest.raises(pbfx.ConfigError, match=r"include='down\.O' matches.*or 'down\.0'"):
        pbfx.transform(Coder(), pbfx.Config(include="down.O"))


@pytest.mark.parametrize(
    "normed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
        ),
        nn.utils.spectral_norm,
    ],
    ids=["weight norm", "spectral norm", "older weight norm", "older spectral norm"],
)
def test_layers_with_computed_weights_outside_of_graphs(normed):
    torch.manual_seed(0)
    model, x = Branch(normed(nn.Conv1d(2, 3, 3))), torch.randn(5, 2)[..., None].expand(5, 2, 4)
    ours = pbfx.transform(nn.ModuleList([model]))[0]
    assert isinstance(ours.inner, nn.Conv1d)
    assert {path: str(p.perforation.rung) for path, p in parts_of(ours).items()} == {"inner": "op"}
    torch.manual_seed(0)
    again = Branch(normed(nn.Conv1d(2, 3, 3)))
    for _ in range(2):
        assert torch.equal(ours.inner(x), again.inner(x))
    pbfx.grow(ours)
    assert torch.equal(ours.inner(x), again.inner(x))
    randomise(ours)
    out = ours.inner(x)
    assert not torch.equal(out, again.inner(x))
    out.sum().backward()
    learning = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert any("original" in name or name.endswith(("_orig", "_v")) for name in learning)
    assert "inner.dendrites.to_soma" in learning


def test_parameters_of_a_kept_forward_are_reported():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.w, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.fc(x @ self.w * self.scale) if len(x) else x

    explanation = pbfx.explain(pbfx.transform(Own()))
    assert ("w", "parameter", "a forward that is no graph reads it") in explanation.skipped


def test_a_list_that_was_given_is_filled():
    """What goes into the caller's list reaches the output, though no node of the graph says so."""

    class Append(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, found: list[Tensor]) -> Tensor:
            found.append(self.fc(found[-1]))
            return found[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Append(), Append()

        def forward(self, x: Tensor) -> Tensor:
            found = [x] if len(x) else []
            self.first(found)
            self.second(found)
            return torch.cat(found)

    model, x = Net(), torch.randn(3, 4)
    ours = pbfx.transform(model)
    assert rungs(ours) == {"first": "submodule", "second": "submodule"}
    same(model, ours, x)
    randomise(pbfx.grow(ours))
    before, after = model(x), ours(x)
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3:6], before[3:6])


def test_a_fault_that_only_an_absent_input_shows_ends_the_search():
    """The fault lies in a clone that is traced a second time, without the optional input."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.seen = nn.Linear(4, 4), 0

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            if scale is None:
                self.seen = 1
                return self.fc(x)
            return self.fc(x) * scale

    class Net(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.inner(x, scale)

    for model in (Picky(), Net(Picky()), nn.Sequential(Net(Net(Picky())))):
        ours = pbfx.transform(model)
        same(model, ours, torch.randn(3, 4))
        assert [str(p.perforation.rung) for p in parts_of(ours).values()][-1] == "op"


def test_a_layer_that_nobody_calls_grows_nothing():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(F.linear(x, self.read.weight)) if len(x) else x

    torch.manual_seed(0)
    model = pbfx.transform(Around())
    assert parts_of(model).keys() == {"read", "called"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 2), max_dendrites=1)
    x, y = torch.randn(32, 4), torch.randint(2, (32,))
    while not tracker.complete:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        tracker.step(float(len(tracker.history)))
    keys = [key for key in model.state_dict() if "dendrites" in key]
    assert keys
    assert all(key.startswith("called.") for key in keys)
