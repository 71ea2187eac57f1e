"""Small models that between them use everything that `pbfx.transform` promises to handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pbfx

# ‖out - ref‖ / ‖ref‖, as in tests/kernels/tolerances.py.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Convolutional(nn.Module):
    """Batch norm, both kinds of dropout, arithmetic on a buffer, a loose constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.drop = nn.Dropout2d(0.25)
        self.fc = nn.Linear(6 * 4, 5)
        self.register_buffer("scale", torch.tensor(0.5))
        self.classes, self.p = ["a", "b"], 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)), inplace=True)
        x = self.drop(self.conv2(x)).flatten(1)
        x = F.dropout(x, self.p, training=self.training)
        return self.fc(x) * (self.scale + 1) + torch.arange(5)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.fc(self.norm(x)))
        return F.dropout(x, 0.3, self.training)


class Residual(nn.Module):
    """Blocks in a ModuleList, in a plain list, one of them called twice, all updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.order = [self.blocks[0], self.blocks[1], self.blocks[0]]
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.order:
            x = block(x)
        y = self.blocks[0].fc(x)
        y += x
        return self.head(self.act(y))


class Functional(nn.Module):
    """Functions over parameters, with positional and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))
        self.offset = nn.Parameter(torch.randn(4))
        self.heads = nn.ParameterList([torch.randn(5, 4), torch.randn(3, 5)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel, self.offset, padding="same")
        x = torch.tanh(F.conv1d(input=x, weight=self.kernel.repeat(1, 2, 1), stride=2))
        x = F.dropout(x.mean(-1), training=self.training)
        return F.linear(bias=None, weight=self.heads[1], input=F.linear(x, self.heads[0]))


class Wide(nn.Linear):
    """A user's class that computes what nn.Linear does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.note = "a user's own"


class Shared(nn.Module):
    """One module under two names, one weight in two modules, a user's subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = Wide(4, 4)
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.activate = self._activate

    def _activate(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x), 0.4, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.first(x))
        return self.decode(self.encode(self.again(x)))


class Attention(nn.Module):
    """Layers that stay whole, and linear ops over three axes; two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.mix = nn.Linear(4, 4)
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        hidden, last = self.rnn(self.mix(x))
        return {"hidden": hidden, "last": last}


class MyNorm(nn.BatchNorm1d):
    """A user's class that computes what nn.BatchNorm1d does."""


class Normed(nn.Module):
    """Weights that are computed, and every kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 6)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norms = nn.Sequential(
            MyNorm(6), nn.BatchNorm1d(6, track_running_stats=False), nn.GroupNorm(2, 6)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms(self.spectral(self.weighted(self.plain(x)))))


class Branch(nn.Module):
    """Asks for the shape of its input, so that no graph can hold it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.inner(x)) if x.dim() == 2 else x


class Coder(nn.Module):
    """Offers methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.up = nn.Linear(2, 4)
        self.note = {"size": 2}

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.up(z))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


@dataclass(frozen=True)
class Case:
    """A model, an input for it, and the sites that it has."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: tuple[str, ...]

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make()

    def input(self, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CASES = {
    "perceptron": Case(perceptron, (7, 5), ("0", "4")),
    "convolutional": Case(Convolutional, (3, 2, 6, 5), ("conv1", "conv2", "fc")),
    "residual": Case(Residual, (4, 6), ("blocks.0.fc", "blocks.1.fc", "head")),
    "functional": Case(Functional, (3, 2, 7), ("kernel", "heads.0", "heads.1")),
    "shared": Case(Shared, (6, 4), ("first", "encode", "decode")),
    "attention": Case(Attention, (2, 3, 4), ("attend.in_proj_weight", "attend.out_proj", "mix")),
    "normed": Case(Normed, (8, 4), ("plain", "weighted", "spectral", "head")),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def outputs(value: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """Return what a model of these gave as a list."""
    return list(value.values()) if isinstance(value, dict) else [value]


def run(model: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    """Run `model` with torch's global stream at `seed`, so that dropouts fall alike."""
    torch.manual_seed(seed)
    return outputs(model(x))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that two lists of tensors are equal bit for bit, and hold no NaN."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert not one.isnan().any()
        assert one.shape == other.shape
        assert torch.equal(one, other), (one - other).abs().max()
        assert torch.equal(one.signbit(), other.signbit()), "a zero changed its sign"


def randomise(model: nn.Module, seed: int = 5, scale: float = 0.5) -> None:
    """Give all dendrites links that matter, of the scale of what they join."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".to_soma", ".to_dendrite")) or "_dendrites.to_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(values * scale)


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Assert that two lists of tensors are equal up to what their dtype rounds."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not other.is_floating_point():
            assert torch.equal(one, other)
            continue
        scale = other.double().norm().item() or 1.0
        error = (one.double() - other.double()).norm().item() / scale
        # Written so that NaN fails.
        assert error <= TOLERANCES[other.dtype], error


@torch.no_grad()
def assert_lowers(model: nn.Module, x: Tensor) -> nn.Module:
    """Assert that the lowered model computes what `model` does in eval mode, and return it."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    lowered = pbfx.lower(model)
    assert [module.training for module in model.modules()] == modes
    assert_near(run(lowered.train(), x.clone()), run(model.eval(), x.clone()))
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return lowered
