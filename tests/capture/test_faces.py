"""Linear ops under other names: products by a parameter, tied, parametrized, quantisation-aware."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx
from models import assert_equal, assert_lowers, randomise, run

F64 = torch.float64


class Net(nn.Module):
    """Parameters for forwards that are given as functions of (self, x)."""

    def __init__(self, body) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        self.rows = nn.Parameter(torch.randn(6, 4))
        self.cube = nn.Parameter(torch.randn(3, 4, 6))
        self.vector = nn.Parameter(torch.randn(4))
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self, x))


# What is written; name and shape of the site's weight; whether it is stored (K, N).
PRODUCTS = {
    "x @ W": (lambda s, x: x @ s.w, "w", True),
    "torch.matmul": (lambda s, x: torch.matmul(x, s.w), "w", True),
    "by keyword": (lambda s, x: torch.matmul(input=x, other=s.w), "w", True),
    "method": (lambda s, x: x.matmul(s.w), "w", True),
    "operator": (lambda s, x: operator.matmul(x, s.w), "w", True),
    "mm": (lambda s, x: torch.mm(x, s.w) + s.b, "w", True),
    "mm method": (lambda s, x: x.mm(s.w), "w", True),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w), "w", True),
    "addmm by keyword": (lambda s, x: torch.addmm(s.b, mat1=x, mat2=s.w, beta=2), "w", True),
    "addmm of a residual": (lambda s, x: torch.addmm(x.repeat(1, 2)[:, :6], x, s.w), "w", True),
    "W.T": (lambda s, x: x @ s.rows.T, "rows", False),
    "W.t()": (lambda s, x: x @ s.rows.t(), "rows", False),
    "W.mT": (lambda s, x: torch.matmul(x, s.rows.mT), "rows", False),
    "W.transpose": (lambda s, x: x @ s.rows.transpose(-2, -1), "rows", False),
    "torch.t": (lambda s, x: torch.mm(x, torch.t(s.rows)), "rows", False),
    "twice": (lambda s, x: x @ s.w.t().T, "w", True),
    "F.linear of W.T": (lambda s, x: F.linear(x, s.w.T), "w", True),
    "F.linear of W.t()": (lambda s, x: F.linear(x, s.w.t(), s.b), "w", True),
    "a layer's weight": (lambda s, x: x @ s.fc.weight.T + s.fc.bias, "fc", False),
}


APART = {
    "addmm by keyword": "its function is given more than weights and a form",
    "addmm of a residual": "its bias is computed",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_a_parameter(name: str):
    body, weight, input_first = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = Net(body).to(F64), torch.randn(5, 4, dtype=F64)
    ours = pbfx.transform(model)
    site, head = ours.perforation.sites
    assert (site.name, site.op, site.input_first) == (weight, "linear", input_first)
    assert (site.neurons, site.fan_in, head.name) == (6, 4, "out")
    assert_equal(run(ours, x), run(model, x))
    assert_equal(run(pbfx.grow(ours, 2, sites=[weight]), x), run(model, x))
    randomise(ours)
    grown = ours.grown()[weight]
    assert grown.weight.shape == (2, *((4, 6) if input_first else (6, 4)))
    # The oracle: one product per dendrite, on a detached input.
    y, activations = body(model, x), []
    for d in range(2):
        v = grown.weight[d] if input_first else grown.weight[d].T
        z = x @ v + (0 if grown.bias is None else grown.bias[d])
        z = z + sum(grown.to_dendrite[d, e] * a for e, a in enumerate(activations))
        activations.append(torch.tanh(z).detach())
        y = y + grown.to_soma[d] * activations[-1]
    expected = model.out(y)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    found, wanted = (
        torch.autograd.grad((out**3).sum(), [grown.to_soma, model.out.weight])
        for out in (ours(x), expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert assert_lowers(ours, x).notes == ({} if name not in APART else {weight: APART[name]})


def test_candidates_of_a_product_learn():
    torch.manual_seed(0)
    model = pbfx.transform(Net(PRODUCTS["x @ W"][0]), pbfx.Config(priming_batches=0, candidates=3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tracker = pbfx.Tracker(model, optimizer, policy=pbfx.Interval(1, 3), max_dendrites=1)
    x, y = torch.randn(64, 4), torch.randn(64, 2)
    tracker.step(0.0)
    pool = model.grown()["w"].candidates
    before = pool.weight.detach().clone()
    while tracker.phase is pbfx.Phase.DENDRITE:
        for _ in range(4):
            F.mse_loss(model(x), y).backward()
        tracker.step(0.0)
    assert pool.weight.shape == (3, 4, 6)
    assert (pool.weight != before).float().mean() > 0.9
    chosen = model.grown()["w"].weight[0]
    assert all(any(torch.equal(chosen[:, n], c[:, n]) for c in pool.best_weight) for n in range(6))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda s, x: (x[:, None] @ s.cube[0])[:, 0], None),
        (lambda s, x: (x @ s.cube).sum(0), "its weight has 3 axes, and dendrites need a matrix"),
        (lambda s, x: (x @ s.vector)[:, None] * s.b, "its weight has 1 axes, and dendrites need a"),
        (lambda s, x: torch.softmax(x @ x.T, -1) @ F.linear(x, s.rows * 2), "its weight is comp"),
        (lambda s, x: x @ (s.w + 1), None),
    ],
)
def test_other_products(body, reason: str | None):
    ours = pbfx.transform(Net(body))
    assert [site.name for site in ours.perforation.sites] == ["out"]
    found = [op.reason for op in ours.perforation.skipped]
    assert len(found) == (reason is not None)
    assert all(text.startswith(reason) for text in found)


def test_a_weight_used_both_ways_is_no_site():
    """A tied autoencoder: no dendrite reads both what the encoder and what the decoder reads."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.tanh(self.encode(x)) @ self.encode.weight)

    ours = pbfx.transform(Tied())
    assert [site.name for site in ours.perforation.sites] == ["last"]
    (op,) = ours.perforation.skipped
    assert (op.name, op.reason) == ("encode", "its weight is used with two different geometries")


class Language(nn.Module):
    """A head tied to an embedding, through a layer or through a function."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False) if layer else None
        if layer:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.fc(self.embed(tokens)))
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


@pytest.mark.parametrize("layer", [True, False])
def test_a_head_tied_to_an_embedding(layer: bool):
    torch.manual_seed(0)
    model, tokens = Language(layer), torch.randint(7, (3, 5))
    ours = pbfx.transform(model)
    name = "head" if layer else "embed.weight"
    assert [site.name for site in ours.perforation.sites] == ["fc", name]
    assert [op.name for op in ours.perforation.skipped] == ["embed"]
    pbfx.grow(ours)
    assert torch.equal(ours(tokens), model(tokens))
    randomise(ours)
    F.cross_entropy(ours(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert ours.grown()[name].to_soma.grad.abs().sum() > 0
    if layer:
        assert ours.head.weight is ours.embed.weight
    keys = [key for key in ours.state_dict() if "dendrites" not in key]
    assert keys == list(model.state_dict())


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (old_weight_norm, "weight_v"),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("space", [False, True])
def test_layers_whose_weight_is_computed(kind: str, space: bool):
    wrap, home = COMPUTED[kind]
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(4, 3, 2, 2) if space else nn.Linear(4, 3)
    model = nn.Sequential(wrap(layer), nn.Tanh()).to(F64)
    x = torch.randn(5, 4, 3, dtype=F64) if space else torch.randn(5, 4, dtype=F64)
    ours = pbfx.transform(model)
    (site,) = ours.perforation.sites
    assert (site.name, site.home, site.bias) == ("0", f"0.{home}", "0.bias")
    buffers = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run(model, x)
    model.load_state_dict(buffers)
    assert_equal(run(ours, x), expected)
    model.load_state_dict(buffers)
    assert_equal(run(pbfx.grow(ours), x), expected)
    randomise(ours)
    grown = ours.grown()["0"]
    assert_lowers(ours, x)
    ours(x).square().sum().backward()
    assert grown.to_soma.grad.abs().sum() > 0
    assert ours.get_parameter(site.home).grad.abs().sum() > 0
    # They join the soma's parameter group.
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fresh = pbfx.transform(model)
    tracker = pbfx.Tracker(fresh, optimizer, policy=pbfx.Interval(1, 1), max_dendrites=1)
    while fresh.structure().dendrites == 0:
        fresh(x).square().sum().backward()
        tracker.step(0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(fresh.grown()["0"].to_soma) in held


def test_quantisation_aware_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn import qat
        from torch.ao.quantization import get_default_qat_qconfig

        config = get_default_qat_qconfig("x86")
        torch.manual_seed(0)
        model = nn.Sequential(
            qat.Conv2d(2, 3, 2, qconfig=config),
            nn.ReLU(),
            nn.Flatten(),
            qat.Linear(12, 4, qconfig=config),
        )
        x = torch.randn(6, 2, 3, 3)
        model(x)
        ours = pbfx.transform(model)
        assert [(site.name, site.op) for site in ours.perforation.sites] == [
            ("0", "conv2d"),
            ("3", "linear"),
        ]
        assert_equal(run(ours, x), run(model, x))
        randomise(pbfx.grow(ours))
        assert not torch.equal(ours(x), model(x))
        assert set(assert_lowers(ours, x).notes.values()) == {"it rounds its weight at each call"}
        ours(x).square().sum().backward()
    assert all(grown.to_soma.grad.abs().sum() > 0 for grown in ours.grown().values())


def test_fused_and_quantised_layers_are_reported():
    """Fused ones are traced into, and what stands there rounds the weight first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.intrinsic import qat as fused
        from torch.ao.nn.quantized import dynamic
        from torch.ao.quantization import get_default_qat_qconfig

        model = nn.Sequential(
            fused.LinearReLU(4, 4, qconfig=get_default_qat_qconfig("x86")),
            dynamic.Linear(4, 4),
            nn.Linear(4, 2),
        )
        ours = pbfx.transform(model)
    reasons = {op.name: op.reason for op in ours.perforation.skipped}
    assert reasons == {
        "linear": "its weight is computed, not a parameter",
        "1": "its weight is quantised, and dendrites need a floating-point one",
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_say_what_can_be_done(kind: type[nn.RNNBase]):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = kind(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.rnn(x)[0])

    (op,) = pbfx.transform(Net()).perforation.skipped
    assert op.op == kind.__name__
    assert "inside one op" in op.reason
    assert f"nn.{kind.__name__}Cell" in op.reason


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("names", [("linear1",), ("linear2",), ("linear1", "linear2")])
def test_fast_paths_stand_aside_for_dendrites(names: tuple[str, ...]):
    """torch's fused encoder layer reads weights around the modules, in eval without gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    for name in names:
        part = pbfx.transform(getattr(layer, name))
        setattr(layer, name, part)
        randomise(pbfx.grow(part))
    with torch.no_grad():
        fast = layer(x)
    slow = layer(x)
    torch.testing.assert_close(fast, slow.detach())
    torch.testing.assert_close(torch.nn.TransformerEncoder(layer, 1)(x), slow)
    assert_lowers(layer, x)
