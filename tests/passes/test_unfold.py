"""Layers that compute linear maps inside one call are taken apart where dendrites grow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import pbfx
from models import assert_equal, randomise
from pbfx.passes import unfold_layers
from pbfx.passes.context import PassContext
from pbfx.phase import Phase
from pbfx.sites import describe_sites

F64 = torch.float64


class Calls(nn.Module):
    """Call one layer as given, and sum up what it returns so that everything gets a gradient."""

    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Any:
        return self.call(self.layer, x, y, mask)


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if v is not None]


def gradients(model: nn.Module, out: list[Tensor], *inputs: Tensor) -> list[Tensor | None]:
    wanted = [p for n, p in model.named_parameters() if "dendrites" not in n]
    loss = sum((value**2).sum() + value.sum() for value in out if value.requires_grad)
    return list(torch.autograd.grad(loss, [*wanted, *inputs], allow_unused=True))


def check(
    layer: nn.Module,
    call,
    shapes: tuple,
    mask: Tensor,
    names: list[str],
    idle: list[str] = (),
    rounding: float = 0.0,
) -> nn.Module:
    """Grow dendrites without links: outputs and gradients stay the same bit for bit."""
    model = Calls(layer, call)
    x, y = (torch.randn(shape).requires_grad_() for shape in shapes)
    ours = pbfx.transform(model)
    assert [site.name for site in ours.perforation.sites] == names
    results = []
    for grown in (False, True):
        if grown:
            pbfx.grow(ours, 2)
            ours.graph.lint()
            called = {n.target for n in ours.graph.nodes if n.op == "call_module"}
            assert "layer" not in called
        for training in (True, False):
            model.train(training)
            ours.train(training)
            torch.manual_seed(3)
            expected = flat(model(x, y, mask))
            torch.manual_seed(3)
            found = flat(ours(x, y, mask))
            assert_equal(found, expected)
            results.append(found)
            for one, other in zip(
                gradients(ours, found, x, y), gradients(model, expected, x, y), strict=True
            ):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
    # Dendrites reach the output, and learn.
    randomise(ours)
    out = flat(ours(x, y, mask))
    assert not torch.equal(out[0], results[-1][0])
    out[0].square().sum().backward()
    for name, module in ours.grown().items():
        assert (module.to_soma.grad.abs().sum() > 0) != (name in idle), name
    ctx = PassContext(ours.perforation.sites, Phase.NEURON)
    assert unfold_layers(ours, ctx) == 0
    return ours


CELLS = {
    "LSTMCell": lambda bias, size=5: nn.LSTMCell(4, size, bias),
    "GRUCell": lambda bias, size=5: nn.GRUCell(4, size, bias),
    "RNNCell": lambda bias, size=5: nn.RNNCell(4, size, bias),
    "relu RNNCell": lambda bias, size=5: nn.RNNCell(4, size, bias, "relu"),
}
STATES = {
    "none": lambda cell, x, y, m: cell(x),
    "given": lambda cell, x, y, m: cell(x, (y, y * 2) if isinstance(cell, nn.LSTMCell) else y),
    "by keyword": lambda cell, x, y, m: cell(
        input=x, hx=(y, y * 2) if isinstance(cell, nn.LSTMCell) else y
    ),
    "of an earlier step": lambda cell, x, y, m: cell(x * 2, cell(x)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("batch", "size"), [((3,), 5), ((9,), 24), ((), 5)])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, state: str, batch: tuple[int, ...], size: int, bias: bool):
    # Such that a single sample leaves one of a few relus alive.
    torch.manual_seed(2 if kind == "relu RNNCell" else 0)
    shapes = ((*batch, 4), (*batch, size))
    names = ["layer.weight_ih", "layer.weight_hh"]
    # Without a state and a bias the map of the state is zero, and so are its dendrites.
    idle = names[1:] if state == "none" and not bias else []
    ours = check(CELLS[kind](bias, size), STATES[state], shapes, torch.empty(0), names, idle)
    assert ours.get_parameter("layer.weight_hh_dendrites.to_soma").shape == (
        2,
        len(ours.layer.weight_hh),
    )


def test_dendrites_of_a_cell_add_to_its_gates():
    torch.manual_seed(0)
    cell = nn.LSTMCell(4, 5).to(F64)
    ours = pbfx.transform(Calls(cell, STATES["given"]))
    randomise(pbfx.grow(ours))
    x, h = torch.randn(3, 4, dtype=F64), torch.randn(3, 5, dtype=F64)
    grown = ours.grown()

    def gates(name: str, value: Tensor) -> Tensor:
        d = grown[f"layer.weight_{name}"]
        added = d.to_soma[0] * torch.tanh(F.linear(value, d.weight[0], d.bias[0]))
        own = getattr(cell, f"weight_{name}"), getattr(cell, f"bias_{name}")
        return F.linear(value, *own) + added

    i, f, g, o = (gates("ih", x) + gates("hh", h)).chunk(4, 1)
    c = torch.sigmoid(f) * h * 2 + torch.sigmoid(i) * torch.tanh(g)
    expected = torch.sigmoid(o) * torch.tanh(c), c
    for found, wanted in zip(ours(x, h, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


BOOLEAN = torch.tensor([[False, False, True], [False, False, False]])
MASKS: dict[str, tuple[Tensor, dict[str, str]]] = {
    "none": (torch.empty(0), {}),
    "boolean": (torch.triu(torch.ones(3, 3, dtype=torch.bool), 1), {"attn_mask": "mask"}),
    "float": (torch.randn(3, 3), {"attn_mask": "mask"}),
    "per head": (torch.randn(4, 3, 3), {"attn_mask": "mask"}),
    "padding": (BOOLEAN, {"key_padding_mask": "mask"}),
}


def attention(attend: nn.Module, x: Tensor, y: Tensor, mask: Tensor, **settings: Any) -> Any:
    values = {k: mask if v == "mask" else v for k, v in settings.items()}
    other = values.pop("other", "self")
    key, value = {"self": (x, x), "cross": (y, y), "apart": (y, x)}[other]
    return attend(x, key, value, **values)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("need_weights", "batch_first", "dropout"),
    list(itertools.product((True, False), (True, False), (0.0, 0.3))),
)
def test_self_attention(mask: str, need_weights: bool, batch_first: bool, dropout: float):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, dropout, batch_first=batch_first)
    value, settings = MASKS[mask]
    shape = (2, 3, 8) if batch_first else (3, 2, 8)
    names = ["layer.in_proj_weight", "layer.out_proj"]
    settings = {**settings, "need_weights": need_weights}
    check(layer, lambda *a: attention(*a, **settings), (shape, shape), value, names)


@pytest.mark.parametrize(
    ("settings", "build", "other", "names"),
    [
        ({"average_attn_weights": False}, {}, (2, 3, 8), ["in_proj_weight", "out_proj"]),
        ({"need_weights": False}, {"bias": False}, (2, 3, 8), ["in_proj_weight", "out_proj"]),
        ({"other": "cross"}, {}, (2, 5, 8), ["out_proj"]),
        ({"other": "cross", "need_weights": False}, {"bias": False}, (2, 5, 8), ["out_proj"]),
        ({"other": "apart"}, {}, (2, 3, 8), ["out_proj"]),
        (
            {"other": "cross"},
            {"kdim": 6, "vdim": 6},
            (2, 5, 6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"],
        ),
        (
            {"other": "cross", "need_weights": False},
            {"kdim": 6, "vdim": 6, "bias": False},
            (2, 5, 6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"],
        ),
    ],
)
def test_other_attention(settings: dict, build: dict, other: tuple[int, ...], names: list[str]):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **build)
    paths = [f"layer.{name}" for name in names]
    shapes = ((2, 3, 8), other)
    ours = check(layer, lambda *a: attention(*a, **settings), shapes, torch.empty(0), paths)
    reasons = {op.name: op.reason for op in ours.perforation.skipped}
    if names == ["out_proj"]:
        assert "its query is not its key" in reasons["layer.in_proj_weight"]
    else:
        assert not reasons


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch(need_weights: bool):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    names = ["layer.in_proj_weight", "layer.out_proj"]
    for key in ("attn_mask", "key_padding_mask"):
        mask = torch.randn(3, 3) if key == "attn_mask" else BOOLEAN[0]
        settings = {key: "mask", "need_weights": need_weights}
        # torch then projects by three products, whose gradients add up in another order.
        check(
            layer,
            lambda *a, s=settings: attention(*a, **s),
            ((3, 8), (3, 8)),
            mask,
            names,
            rounding=1e-5,
        )


def test_causal_attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    names = ["layer.in_proj_weight", "layer.out_proj"]
    for need_weights in (True, False):
        settings = {"attn_mask": "mask", "is_causal": True, "need_weights": need_weights}
        check(
            layer,
            lambda *a, s=settings: attention(*a, **s),
            ((2, 3, 8), (2, 3, 8)),
            mask,
            names,
        )


def test_only_what_has_grown_is_taken_apart():
    """Without dendrites the layer keeps its one call, and so its fused path for inference."""
    model = nn.Sequential(nn.LSTMCell(4, 5))
    ours = pbfx.transform(Calls(nn.MultiheadAttention(8, 2, batch_first=True), attention))
    calls = [n.target for n in ours.graph.nodes if n.op == "call_module"]
    assert calls == ["layer"]
    x = torch.randn(2, 3, 8)
    ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(x, x, x)[0], ours.layer(x, x, x)[0])
    pbfx.grow(ours, sites=["layer.out_proj"])
    targets = [n.target for n in ours.graph.nodes]
    assert "layer" not in targets
    assert "layer.out_proj.dendrites" in targets
    assert "layer.in_proj_weight_dendrites" not in targets
    assert len(pbfx.transform(model).perforation.sites) == 2


class Doubled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def frozen(layer: nn.Module) -> nn.Module:
    weight = layer.out_proj._parameters.pop("weight")
    layer.out_proj.register_buffer("weight", weight.detach())
    return layer


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        (hooked(nn.MultiheadAttention(8, 2)), {}, "it has hooks"),
        (hooked(nn.GRUCell(8, 8)), None, "it has hooks"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), {}, "it lengthens its keys"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), {}, "it lengthens its keys"),
        (nn.MultiheadAttention(8, 2), {"is_causal": True}, "is_causal and without attn_mask"),
        (nn.MultiheadAttention(8, 2), {"need_weights": "mask"}, "is computed"),
        (frozen(nn.MultiheadAttention(8, 2)), {}, "its weights are computed"),
        (Doubled(8, 2), {}, "it computes something else than MultiheadAttention"),
    ],
)
def test_why_a_layer_stays_whole(layer: nn.Module, settings: dict | None, reason: str):
    graph = fx.Graph()
    x = graph.placeholder("x")
    given = {k: x if v == "mask" else v for k, v in (settings or {}).items()}
    arguments = (x,) if settings is None else (x, x, x)
    graph.output(graph.call_module("layer", arguments, given))
    root = nn.Module()
    root.layer = layer
    sites, (op,) = describe_sites(root, graph)
    assert not sites
    assert (op.name, op.op) == ("layer", type(layer).__name__)
    assert reason in op.reason
    assert [n.op for n in graph.nodes] == ["placeholder", "call_module", "output"]


def test_layers_of_transformers_say_what_can_be_done():
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    root = nn.Module()
    root.layer = nn.TransformerEncoderLayer(8, 2)
    _, (op,) = describe_sites(root, graph)
    assert op.op == "TransformerEncoderLayer"
    assert "stays one call" in op.reason


class Recurrent(nn.Module):
    """A cell over time, attention over what it gave, a norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, state = [], None
        for step in range(3):
            state = self.cell(x[:, step], state)
            states.append(state)
        y = torch.stack(states, 1)
        return self.head(self.norm(y + self.attend(y, y, y)[0]))


@pytest.mark.parametrize("learning", ["perforated", "gradient"])
def test_they_grow_learn_and_load(learning: str):
    torch.manual_seed(0)
    names = ["cell.weight_ih", "cell.weight_hh", "attend.in_proj_weight", "attend.out_proj", "head"]
    ours = pbfx.transform(Recurrent(), pbfx.Config(learning=learning, priming_batches=1))
    assert [(s.name, s.calls) for s in ours.perforation.sites] == [
        (name, 3 if name.startswith("cell") else 1) for name in names
    ]
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-2)
    tracker = pbfx.Tracker(ours, optimizer, policy=pbfx.Interval(1, 2), max_dendrites=2)
    x, y = torch.randn(32, 3, 4), torch.randn(32, 3, 2)
    while not tracker.complete:
        ours.train()
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(ours(x), y).backward()
            optimizer.step()
        ours.eval()
        tracker.step(-float(F.mse_loss(ours(x), y).detach()))
    assert ours.structure().dendrites > 0
    fresh = pbfx.transform(Recurrent())
    fresh.load_state_dict(ours.state_dict())
    assert fresh.structure() == ours.structure()
    assert torch.equal(fresh.eval()(x), ours.eval()(x))


def test_the_dendrite_phase_holds_attention_in_eval():
    torch.manual_seed(0)
    ours, x = pbfx.transform(Recurrent()), torch.randn(8, 3, 4)
    expected = ours.eval()(x)
    pbfx.restructure.start_dendrite_phase(ours)
    for training in (True, False):
        for part in ours.modules():
            part.training = training
        assert torch.equal(ours(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_on_the_gpu(kind: str, bias: bool):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        cell = CELLS[kind](bias).to("cuda", dtype)
        model = Calls(cell, STATES["given"])
        ours = pbfx.transform(model)
        x, y = (torch.randn(3, n, device="cuda", dtype=dtype).requires_grad_() for n in (4, 5))
        expected = flat(model(x, y, x))
        pbfx.grow(ours)
        assert_equal(flat(ours(x, y, x)), expected)
        ours(x, y, x)[0].sum().backward()
        assert x.grad is not None


class Loop(nn.Module):
    """Cells in a loop that no trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(4, 6), nn.GRUCell(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, None
        for step in x.unbind(1):
            if step.isnan().any():
                break
            state = self.first(step, state)
            hidden = self.second(state[0], hidden)
        return self.head(hidden)


def test_cells_that_a_forward_of_its_own_calls():
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(3, 4, 4)
    expected = model(x)
    ours = pbfx.transform(model)
    names = {site.name for site in pbfx.explain(ours).sites}
    cells = {f"{c}.weight_{k}" for c in ("first", "second") for k in ("ih", "hh")}
    assert names == cells | {"head"}
    assert isinstance(ours.first, nn.LSTMCell)
    assert torch.equal(ours(x), expected)
    assert torch.equal(pbfx.grow(ours, 2)(x), expected)
    randomise(ours)
    assert not torch.equal(ours(x), expected)
    ours(x).square().sum().backward()
    links = {n: p for n, p in ours.named_parameters() if n.endswith("to_soma")}
    assert len(links) == 5
    assert all(p.grad.abs().sum() > 0 for p in links.values())
    fresh = pbfx.transform(Loop())
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), ours(x))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_that_is_the_whole_model(kind: str):
    torch.manual_seed(0)
    cell = CELLS[kind](True)
    ours = pbfx.transform(cell)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    for state in (None, (h, h * 2) if isinstance(cell, nn.LSTMCell) else h):
        assert_equal(flat(ours(x, state)), flat(cell(x, state)))
        assert_equal(flat(ours(x, hx=state)), flat(cell(x, hx=state)))
    pbfx.grow(ours)
    assert_equal(flat(ours(x)), flat(cell(x)))
    assert [site.name for site in pbfx.explain(ours).sites] == ["weight_ih", "weight_hh"]
