"""What has to hold for every graph, over random ones: MLPs, CNNs, residual, shared, mixed.

The oracle for outputs and gradients interprets the source graph and adds the dendrites in plain
torch: each dendrite is one more call of the soma, with the dendrite's weights, on a detached input.
It shares no code with pbfx's ops, geometry or passes. Everything runs in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pbfx
from models import assert_equal, assert_lowers, randomise, run
from pbfx.dendrites import Dendrites
from pbfx.parts import candidate_parameters
from pbfx.perforated import PerforatedModule
from pbfx.phase import Phase
from pbfx.restructure import promote, start_dendrite_phase, thaw

# Of torch itself, about "same" with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")

WIDTH = 4
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
# A model is a list of steps; a step is a word, and for some a number or a list of steps.
Step = tuple[Any, ...]

plain_linears = st.one_of(
    st.tuples(st.just("linear"), st.booleans()),
    st.tuples(st.just("function"), st.booleans()),
    # Calls again the n-th soma so far.
    st.tuples(st.just("again"), st.integers(0, 3)),
)
plain_convs = st.one_of(
    st.tuples(st.just("transposed"), st.sampled_from([1, 2, WIDTH]), st.booleans()),
    st.tuples(
        st.just("conv"),
        st.sampled_from([1, 2, 3]),
        st.sampled_from([1, 2]),
        st.sampled_from([1, 2, WIDTH]),
        st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    ),
    st.tuples(st.just("function"), st.booleans()),
    st.tuples(st.just("again"), st.integers(0, 3)),
)
# A soma that a norm alone reads: its dendrites join after the norm.
NORMED = ("batch", "group", "layer", "instance", "rms", "function", "permuted")
linears, convs = (
    st.one_of(plain, st.tuples(st.just("normed"), plain, st.sampled_from(NORMED)))
    for plain in (plain_linears, plain_convs)
)
others = st.one_of(
    st.tuples(st.sampled_from(["relu", "tanh", "inplace", "dropout", "functional dropout"])),
    st.tuples(st.sampled_from(["norm", "statistics", "layer norm", "buffer", "constant"])),
)


def programs(somas: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    step = st.one_of(somas, others)
    residual = st.tuples(st.just("residual"), st.lists(step, min_size=1, max_size=3))
    return st.lists(st.one_of(somas, others, residual), max_size=5)


class Random(nn.Module):
    """A model of `steps`, between an op that is always there and a linear head."""

    def __init__(self, steps: list[Step], space: bool) -> None:
        super().__init__()
        self.steps, self.space = steps, space
        self.parts, self.params = nn.ModuleList(), nn.ParameterList()
        self.register_buffer("shift", torch.tensor(0.25))
        # For each step that owns something, by identity: how to compute it. Steps that own nothing
        # are words.
        self.somas: list[Any] = []
        self.plan = [self._soma(("linear", True)), *(self._prepare(step) for step in steps)]
        self.head = nn.Linear(WIDTH, 3)

    def _add(self, module: nn.Module) -> tuple[str, int]:
        self.parts.append(module)
        return "part", len(self.parts) - 1

    def _soma(self, step: Step) -> Any:
        kind, *rest = step
        if kind == "again":
            return self.somas[rest[0] % len(self.somas)]
        if kind == "function":
            shape = (WIDTH, WIDTH, 3, 3) if self.space else (WIDTH, WIDTH)
            self.params.append(torch.randn(shape) / 3)
            if rest[0]:
                self.params.append(torch.randn(WIDTH))
            found = ("function", len(self.params) - 1 - rest[0], rest[0])
        elif kind == "conv":
            kernel, dilation, groups, mode = rest
            found = self._add(
                nn.Conv2d(
                    WIDTH,
                    WIDTH,
                    kernel,
                    padding="same",
                    dilation=dilation,
                    groups=groups,
                    padding_mode=mode,
                    bias=kernel != 2,
                )
            )
        elif kind == "transposed":
            groups, bias = rest
            found = self._add(nn.ConvTranspose2d(WIDTH, WIDTH, 3, 1, 1, groups=groups, bias=bias))
        elif self.space:
            found = self._add(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=rest[0]))
        else:
            found = self._add(nn.Linear(WIDTH, WIDTH, bias=rest[0]))
        self.somas.append(found)
        return found

    def _prepare(self, step: Step) -> Any:
        kind = step[0]
        if kind in ("linear", "conv", "transposed", "function", "again"):
            return self._soma(step)
        if kind == "normed":
            soma, norm = self._soma(step[1]), step[2]
            if norm == "function":
                return "normed", soma, norm, None
            made = {
                "batch": nn.BatchNorm2d if self.space else nn.BatchNorm1d,
                "instance": nn.InstanceNorm2d if self.space else nn.LayerNorm,
                "layer": nn.LayerNorm,
                "permuted": nn.LayerNorm,
                "rms": nn.RMSNorm,
            }
            last = norm in ("layer", "rms") and self.space
            module = nn.GroupNorm(2, WIDTH) if norm == "group" or last else made[norm](WIDTH)
            return "normed", soma, norm, self._add(module)
        if kind == "residual":
            return "residual", [self._prepare(inner) for inner in step[1]]
        if kind == "norm":
            return self._add(nn.BatchNorm2d(WIDTH) if self.space else nn.BatchNorm1d(WIDTH))
        if kind == "statistics":
            norm = nn.BatchNorm2d if self.space else nn.BatchNorm1d
            return self._add(norm(WIDTH, track_running_stats=False))
        if kind == "layer norm":
            return self._add(nn.GroupNorm(2, WIDTH))
        if kind == "dropout":
            return self._add(nn.Dropout2d(0.3) if self.space else nn.Dropout(0.3))
        if kind == "inplace":
            return self._add(nn.Hardtanh(inplace=True))
        return step

    def _apply_step(self, step: Any, x: Tensor) -> Tensor:
        kind, *rest = step
        if kind == "part":
            return self.parts[rest[0]](x)
        if kind == "residual":
            y = x
            for inner in rest[0]:
                # Nothing in place on what the sum still needs.
                y = self._apply_step(inner, y * 1)
            return x + y
        if kind == "function":
            weight = self.params[rest[0]]
            bias = self.params[rest[0] + 1] if rest[1] else None
            if self.space:
                return F.conv2d(x, weight, bias, padding=1)
            return F.linear(x, weight, bias=bias)
        if kind == "normed":
            soma, norm, part = rest
            y = self._apply_step(soma, x)
            if norm == "function":
                return F.batch_norm(y, None, None, training=True)
            if norm == "permuted" and self.space:
                return self.parts[part[1]](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.parts[part[1]](y)
        if kind == "functional dropout":
            return F.dropout(x, 0.3, training=self.training)
        if kind == "buffer":
            return x * (self.shift + 1)
        if kind == "constant":
            return x + torch.linspace(0, 1, 1)
        return getattr(torch, kind)(x)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.plan:
            # An op in place must not write into what a soma keeps for its own gradient.
            x = self._apply_step(step, x * 1)
        return self.head(x.mean((2, 3)) if self.space else x)

    def _input(self) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        shape = (3, WIDTH, 5, 6) if self.space else (5, WIDTH)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def models(draw: st.DrawFn) -> Random:
    space = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 3)))
    model = Random(draw(programs(convs if space else linears)), space).to(torch.float64)
    # Given to whoever reads a failure.
    note(str(model.plan))
    return model.train(draw(st.booleans()))


class Oracle(fx.Interpreter):
    """Run the source graph of a perforated model, with dendrites in plain torch."""

    def __init__(self, model: PerforatedModule) -> None:
        super().__init__(model, False, graph=model.perforation.source)
        config = model.perforation.config
        self.activate, self.detached = ACTIVATIONS[config.activation], config.learning != "gradient"
        self.waiting: dict[fx.Node, fx.Node] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.dendrites = {
            site.weight: {
                role: parameters.get(f"{site.dendrites}.{role}")
                for role in ("weight", "bias", "to_soma", "to_dendrite")
            }
            for site in model.perforation.sites
            if f"{site.dendrites}.weight" in parameters
        }

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        norm = self.norm_after(n) if self.roles(n) is not None else None
        if norm is not None:
            self.waiting[norm] = n
            return y
        soma = self.waiting.pop(n, n)
        if self.roles(soma) is None:
            return y
        # What is permuted on the way to the norm gets its dendrites permuted.
        if soma is not n and n.args[0] is not soma:
            return self.joined(soma, y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.joined(soma, y)

    def norm_after(self, soma: fx.Node) -> fx.Node | None:
        """Return the norm that reads `soma` and nothing else does, through a permutation or not."""
        (reader, *more) = soma.users
        if not more and reader.target == "permute":
            (reader, *more) = reader.users
        if more or reader.target is F.batch_norm:
            return None if more else reader
        kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
        is_norm = reader.op == "call_module" and isinstance(self.fetch_attr(reader.target), kinds)
        return reader if is_norm else None

    def roles(self, n: fx.Node) -> dict[str, Tensor] | None:
        weight = f"{n.target}.weight" if n.op == "call_module" else None
        if n.target in (F.linear, F.conv2d):
            weight = n.args[1].target
        return self.dendrites.get(weight)

    def joined(self, n: fx.Node, y: Tensor) -> Tensor:
        """Add to `y` the dendrites of the soma `n`."""
        roles = self.roles(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = args[0].detach() if self.detached else args[0]
        shape = [1] * y.dim()
        shape[1] = -1
        activations: list[Tensor] = []
        for d in range(len(roles["weight"])):
            one = {
                role: value[d].detach() if self.detached and role != "to_soma" else value[d]
                for role, value in roles.items()
                if value is not None
            }
            if n.op == "call_module":
                # A soma without a bias has dendrites with one where a norm follows it.
                values = {k: v for k, v in one.items() if k in ("weight", "bias")}
                z = torch.func.functional_call(self.fetch_attr(n.target), values, (x,))
            else:
                bias = one.get("bias")
                rest = args[3:]
                if len(args) > 2:
                    z = n.target(x, one["weight"], bias, *rest, **kwargs)
                else:
                    z = n.target(x, one["weight"], **(kwargs | {"bias": bias}))
            for e, a in enumerate(activations):
                z = z + one["to_dendrite"][e].view(shape) * a
            activations.append(self.activate(z))
            y = y + one["to_soma"].view(shape) * activations[-1]
        return y


def gradients(out: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # A cubic, so that the error is not a constant.
    loss = (out**3).sum() + out.sum()
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return dict(zip(learning, found, strict=True))


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}"
    )


@given(models())
def test_insertion_is_bit_identical(model: Random):
    ours, x = pbfx.transform(model), model._input()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(ours.state_dict()) == list(state)
    expected = run(model, x)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert_equal(run(ours, x), expected)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in after.items())


@given(models(), st.integers(1, 3))
def test_growth_keeps_the_output_and_the_keys(model: Random, dendrites: int):
    model.eval()
    ours, x = pbfx.transform(model), model._input()
    expected, keys = run(ours, x), list(model.state_dict())
    pbfx.grow(ours, dendrites)
    assert_equal(run(ours, x), expected)
    assert [key for key in ours.state_dict() if "dendrites" not in key] == keys
    assert ours.structure().dendrites == dendrites


@given(models(), st.integers(0, 3))
def test_lowering_computes_the_same(model: Random, dendrites: int):
    ours, x = pbfx.transform(model), model._input()
    # Running statistics that matter.
    run(ours.train(), x)
    if dendrites:
        randomise(pbfx.grow(ours, dendrites))
    lowered = assert_lowers(ours, x)
    modules = list(lowered.modules())
    assert not any(isinstance(m, (nn.Dropout, Dendrites)) for m in modules), lowered.code
    assert not any(n.op == "get_attr" and n.target == "training" for n in lowered.graph.nodes)


@given(
    models(),
    st.integers(1, 3),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(["perforated", "gradient", "sham"]),
)
def test_outputs_and_gradients_are_the_oracles(
    model: Random, dendrites: int, activation: str, learning: str
):
    ours = pbfx.transform(model, pbfx.Config(activation=activation, learning=learning))
    randomise(pbfx.grow(ours, dendrites), scale=0.7)
    x = model._input().requires_grad_()
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    (out,) = run(ours, x)
    found = gradients(out, ours)
    (to_input,) = torch.autograd.grad(run(ours, x)[0].square().sum(), x)

    ours.load_state_dict(state)
    oracle = Oracle(ours)
    assert oracle.dendrites
    torch.manual_seed(3)
    expected_out = oracle.run(x)
    expected = gradients(expected_out, ours)
    torch.manual_seed(3)
    (expected_to_input,) = torch.autograd.grad(oracle.run(x).square().sum(), x)

    assert_close(out, expected_out, "output")
    for name, gradient in found.items():
        wanted = expected[name]
        if wanted is None:
            assert gradient is None or not gradient.any(), name
        else:
            assert_close(gradient, wanted, name)
    assert_close(to_input, expected_to_input, "gradient of the input")


@given(models(), st.integers(0, 2))
def test_the_dendrite_phase_leaves_the_base_untouched(model: Random, dendrites: int):
    ours, x = pbfx.transform(model, pbfx.Config(candidates=2)), model._input()
    if dendrites:
        randomise(pbfx.grow(ours, dendrites))
    was_training = ours.training
    expected = run(ours.eval(), x)
    ours.train(was_training)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    frozen, learners = start_dendrite_phase(ours)
    for learner in learners.values():
        learner.attach()
    pools = candidate_parameters(ours)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == pools.keys()
    for seed in range(2):
        (out,) = run(ours.train(), x, seed)
        assert_equal([out], expected)
        gradients_left = out.square().sum().backward()
        assert gradients_left is None
    for learner in learners.values():
        assert learner.batches == 2
        learner.detach()
    for key, value in before.items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert all(p.grad is None for n, p in ours.named_parameters() if n not in pools)

    promote(ours, learners)
    thaw(ours, frozen)
    assert ours.perforation.phase is Phase.NEURON
    assert ours.training == was_training
    (out,) = run(ours.eval(), x)
    assert_close(out, expected[0], "output after promotion")


@given(models(), st.integers(0, 2))
def test_state_dicts_grow_a_fresh_model(model: Random, dendrites: int):
    import copy

    fresh = pbfx.transform(copy.deepcopy(model))
    ours, x = pbfx.transform(model), model._input()
    if dendrites:
        randomise(pbfx.grow(ours, dendrites))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    fresh.load_state_dict(ours.state_dict())
    assert fresh.structure() == ours.structure()
    assert_equal(run(fresh.eval(), x), run(ours.eval(), x))
    assert_equal(run(copy.deepcopy(ours), x), run(ours, x))


def test_the_oracle_tells_a_wrong_gradient():
    """An oracle that agrees with everything would prove nothing."""
    torch.manual_seed(0)
    model = Random([("linear", True)], space=False).to(torch.float64)
    x = model._input()
    found = {}
    for learning in ("perforated", "gradient"):
        ours = pbfx.transform(model, pbfx.Config(learning=learning))
        randomise(pbfx.grow(ours))
        found[learning] = gradients(Oracle(ours).run(x), ours)["parts.0.weight"]
    with pytest.raises(AssertionError, match="parts"):
        assert_close(found["perforated"], found["gradient"], "parts")
