"""The kernels for few rows against the float64 oracle, on a GPU or in Triton's interpreter.

`test_streamed_kernels.py` runs this file in a process of its own: Triton reads TRITON_INTERPRET
once.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_cases import Site, Tensors, make_dendrites, make_neurons, oracle_dendrites
from tolerances import assert_close, relative_error
from torch import Tensor
from torch.nn import functional as F

from pbfx_kernels import ACTIVATIONS, candidate_autograd, functional, neuron_op, neurons
from pbfx_kernels.fused_configs import Streams, streams_of
from pbfx_kernels.geometry import LINEAR
from pbfx_kernels.link_and_bias_gradient import link_and_bias_gradients
from pbfx_kernels.streamed_neuron import streamed_neuron

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 matrices by their bit patterns, and a GPU rounds float32 to
# TF32.
DTYPES = (torch.float16, torch.float32 if INTERPRETED else torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# exp(-z) of a very negative z is infinite, and 0 * inf is NaN, which numpy reports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    # A product may be the first that autograd's thread asks of a GPU.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
# Positions, neurons, inputs.
FORMS = ((1, 64, 256), (3, 10, 136), (70, 37, 200), (130, 33, 48), (5, 7, 13), (1, 1, 1))


def drawn(form: tuple[int, int, int], d: int, dtype: torch.dtype) -> tuple[Tensors, Site]:
    """Return a site's tensors, `own` and `offset` of its soma among them; no bias at D = 2."""
    positions, count, inputs = form
    site = Site("streamed", (positions, inputs), (count, inputs))
    tensors: Tensors = dict(make_dendrites(site, d, bias=d != 2).args(dtype))
    tensors["own"] = torch.randn(count, inputs, dtype=torch.float64).div(inputs**0.5).to(dtype)
    tensors["offset"] = torch.randn(count, dtype=torch.float64).to(dtype) if d != 2 else None
    return {n: None if t is None else t.detach().to(DEVICE) for n, t in tensors.items()}, site


def evaluate(
    given: Tensors, activation: str = "tanh", keep: bool = True, streams: Streams | None = None
) -> tuple[Tensor, Tensor]:
    """Run the kernel into memory that is poisoned."""
    x, own = given["x"], given["own"]
    out = x.new_full((len(x), len(own)), torch.nan)
    kept = x.new_full((len(given["to_soma"]), *out.shape), torch.nan) if keep else None
    weights = own, given["weight"], given["offset"], given["bias"]
    links = given["to_soma"], given["to_dendrite"], activation
    streamed_neuron(x, *weights, *links, out, kept, streams)
    return out, out[None, :0] if kept is None else kept


def expect(given: Tensors, site: Site, activation: str = "tanh") -> tuple[Tensor, Tensor]:
    wide = {name: None if t is None else t.cpu().double() for name, t in given.items()}
    wide["soma"] = F.linear(wide["x"], wide["own"], wide["offset"])
    out, activations = oracle_dendrites(site, wide, activation)
    return out, torch.stack(activations)


@dtypes
@pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_matches_the_oracle(form: tuple[int, int, int], d: int, dtype: torch.dtype) -> None:
    given, site = drawn(form, d, dtype)
    wanted, wanted_activations = expect(given, site)
    out, kept = evaluate(given)
    assert_close(out.cpu(), wanted)
    assert_close(kept.cpu(), wanted_activations)
    assert torch.equal(evaluate(given, keep=False)[0], out)


@dtypes
@pytest.mark.parametrize("d", [1, 3, 6])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_do_not_show(splits: int, d: int, dtype: torch.dtype) -> None:
    """However the inputs are shared: seven programs for five steps leave two with nothing."""
    given, site = drawn((20, 9, 72), d, dtype)
    streams = Streams(16, 8, 16, 4, 3, splits)
    wanted, wanted_activations = expect(given, site)
    out, kept = evaluate(given, streams=streams)
    assert_close(out.cpu(), wanted)
    assert_close(kept.cpu(), wanted_activations)
    again = evaluate(given, streams=streams)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], kept)
    assert torch.equal(evaluate(given, keep=False, streams=streams)[0], out)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, splits: int) -> None:
    given, site = drawn((6, 20, 64), 3, DTYPES[0])
    out, kept = evaluate(given, activation, streams=Streams(16, 16, 16, 4, 3, splits))
    wanted, wanted_activations = expect(given, site, activation)
    assert_close(out.cpu(), wanted)
    assert_close(kept.cpu(), wanted_activations)


@dtypes
def test_untrained_dendrites_leave_every_bit(dtype: torch.dtype) -> None:
    given, _ = drawn((17, 24, 64), 3, dtype)
    for splits in (1, 2):
        streams = Streams(32, 8, 32, 4, 3, splits)
        found = []
        for sign in (1, -1):
            given["to_soma"] = sign * torch.zeros_like(given["to_soma"])
            found.append(evaluate(given, streams=streams)[0])
        assert torch.equal(*found)
        soma = F.linear(*(given[name].double() for name in ("x", "own", "offset")))
        assert_close(found[0], soma)


@dtypes
def test_strides_and_dtypes_of_the_caller(dtype: torch.dtype) -> None:
    """Rows apart, columns apart, one weight of all, dendrites and links in other dtypes."""
    given, site = drawn((19, 12, 40), 3, dtype)
    wanted, _ = expect(given, site)
    out, _ = evaluate(given)
    apart = torch.stack([given["x"], torch.full_like(given["x"], torch.nan)], 1)[:, 0]
    columns = given["x"].T.contiguous().T
    for x in (apart, columns):
        assert torch.equal(evaluate(given | {"x": x})[0], out)
    together = torch.cat([given["own"][None], given["weight"]])
    assert torch.equal(evaluate(given | {"own": together[0], "weight": together[1:]})[0], out)
    turned = given["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    links = {name: given[name].float() for name in ("to_soma", "to_dendrite", "bias", "offset")}
    assert_close(evaluate(given | links | {"weight": turned.float()})[0].cpu(), wanted)


def test_reads_strictly_lower_triangle() -> None:
    given, _ = drawn((4, 8, 32), 3, DTYPES[0])
    out, _ = evaluate(given)
    upper = torch.ones(3, 3, dtype=torch.bool, device=DEVICE).triu()
    given["to_dendrite"][upper] = torch.nan
    assert torch.equal(evaluate(given)[0], out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [(3, 24, 64), (2, 5, 40)], ids=str)
def test_packed_neurons(
    form: tuple[int, int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed for inference is read where it is, whatever axes the rows have."""
    monkeypatch.setattr(neurons, "_runs_kernel", lambda *_: True)
    monkeypatch.setattr(neurons, "streams", lambda _: True)
    monkeypatch.setattr(neurons, "_epilogue", None)
    rows, count, inputs = form
    for shape in ((rows, inputs), (2, rows, inputs), (inputs,)):
        case = make_neurons(Site("packed", shape, (count, inputs)), 3, bias, torch.float16)
        given = [None if t is None else t.to(DEVICE) for t in case.together]
        out = neurons.neurons(*given, "tanh", LINEAR)
        assert out.shape == (*shape[:-1], count)
        assert_close(out.cpu(), case.expected)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (32,)], ids=str)
def test_op(shape: tuple[int, ...], keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_op, "streams", lambda _: True)
    given, _ = drawn((5, 20, 32), 3, DTYPES[0])
    x = torch.randn(shape, dtype=torch.float64).to(DTYPES[0]).to(DEVICE)
    names = ("own", "offset", "weight", "bias", "to_soma", "to_dendrite")
    tensors = [given[name] for name in names]
    out, kept = torch.ops.pbfx.perforated_linear.default(x, *tensors, "tanh", keep)
    assert out.shape == (*shape[:-1], 20)
    assert kept.shape == (3 if keep else 0, *out.shape)
    flat = given | {"x": x.reshape(-1, 32)}
    rows, activations = evaluate(flat)
    assert torch.equal(out.reshape(rows.shape), rows)
    assert not keep or torch.equal(kept.reshape(activations.shape), activations)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("rows", [1, 20])
@dtypes
def test_step(rows: int, eager: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, as a user calls it, against autograd of the oracle."""
    if INTERPRETED:
        monkeypatch.setattr(neuron_op, "streams", lambda _: True)
        monkeypatch.setattr(functional, "_may_fuse", lambda _: True)
        monkeypatch.setattr(functional, "_wins", lambda *_: True)
    if not eager:
        monkeypatch.setattr(candidate_autograd, "runs_eagerly", lambda *_: False)
    given, site = drawn((rows, 24, 64), 3, dtype)
    names = ("x", "own", "offset", "weight", "bias", "to_soma", "to_dendrite")
    learning = ("x", "own", "offset", "to_soma")
    wide = {name: given[name].cpu().double() for name in names}
    for name in learning:
        given[name].requires_grad_()
        wide[name].requires_grad_()
    wide["soma"] = F.linear(wide["x"], wide["own"], wide["offset"])
    wanted, _ = oracle_dendrites(site, wide, "tanh")
    out = functional.perforated_linear(*(given[name] for name in names))
    assert ("_Neurons" in type(out.grad_fn).__name__) is eager
    assert_close(out.cpu(), wanted)
    grad = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(out, [given[name] for name in learning], grad.to(DEVICE))
    expected = torch.autograd.grad(wanted, [wide[name] for name in learning], grad.double())
    for name, a, b in zip(learning, found, expected, strict=True):
        assert a.dtype == given[name].dtype
        assert_close(a.cpu(), b)


@pytest.mark.parametrize("d", [1, 3, 8])
@pytest.mark.parametrize("form", [(1, 1), (7, 200), (130, 33), (4000, 10)], ids=str)
@dtypes
def test_both_sums(form: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    """Sums of the error and of its products from one read, the same bits in every run."""
    grad = torch.randn(form, dtype=torch.float64).to(dtype).to(DEVICE)
    activations = torch.randn(d, *form, dtype=torch.float64).to(dtype).to(DEVICE)
    wanted = (grad.double() * activations.double()).sum(1)
    of_links, of_bias = link_and_bias_gradients(grad, activations, torch.float32, dtype)
    assert of_links.dtype == torch.float32
    assert of_bias.dtype == dtype
    assert_close(of_links, wanted)
    assert_close(of_bias, grad.double().sum(0))
    turned = grad.T.contiguous().T, activations.transpose(1, 2).contiguous().transpose(1, 2)
    for given in ((grad, activations), turned):
        again = link_and_bias_gradients(*given, torch.float32, dtype)
        assert relative_error(again[0], of_links) < 1e-6
        assert relative_error(again[1], of_bias) < 1e-3
    assert torch.equal(
        link_and_bias_gradients(grad, activations, torch.float32, dtype)[0], of_links
    )


def test_default_configuration_knows_every_size() -> None:
    for positions in (1, 2, 17, 64, 100, 4096):
        for count in (1, 3, 10, 4097):
            for inputs in (1, 8, 100, 65536):
                for d in range(1, 8):
                    for size in (2, 4):
                        streams = streams_of(positions, count, inputs, d, size)
                        steps = -(-inputs // streams.inputs)
                        assert streams.neurons >= 4
                        assert 1 <= streams.splits <= max(1, steps)
