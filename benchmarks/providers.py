"""Who computes the same network: the plain model, pbfx in each mode, and the rivals.

Floors count GEMM work only, three GEMMs of equal size per layer and training step (forward, weight
gradient, input gradient), and D dendrites and C candidates as large as the soma:

    perforated   (D + 1) + 2        = (D + 3) / 3 of plain: no gradient GEMM for frozen dendrites
    full         3 (D + 1)          = D + 1
    candidates   (D + 1 + C) + 1 + C = (D + 2 + 2C) / 3: the network is frozen, errors pass through
    inference    D + 1, in any mode
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import pbfx
from benchmarks import loop
from pbfx.candidates import Candidates

# Only the speed matters: so small a rate keeps weights and activations ordinary for ever.
LEARNING_RATE = 1e-5
CONFIG = pbfx.Config(activation="tanh")
GRADIENT = dataclasses.replace(CONFIG, learning="gradient")
# Longer than any benchmark: the phase must not end while it is timed.
_FOREVER = 10**9

Built = tuple[nn.Module, Optimizer]
Gradients = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a network with D dendrites at every site.

    Attributes:
        name: in the table.
        build: `build(plain, state, D)`: from a copy of the plain model, which it may keep, and the
            pbfx state dict with the dendrites' weights.
        train_floor: from D to the least multiple of plain's training step.
        gradients: from the built model, after a backward pass, to its gradients by pbfx's names;
            None where the gate compares outputs only.
        rival: the provider that does the same work the naive way; judged against it.
        cycle: training steps after which the work repeats.
        warmup: training steps before it is what it stays.
    """

    name: str
    build: Callable[[nn.Module, Mapping[str, Tensor], int], Built]
    train_floor: Callable[[int], float]
    gradients: Callable[[nn.Module], Gradients] | None = None
    rival: str | None = None
    cycle: int = 1
    warmup: int = 3


def sgd(model: nn.Module) -> SGD:
    """Return the optimizer that every provider steps."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return SGD(learning, lr=LEARNING_RATE, momentum=0.9)


def dendrite_state(plain: nn.Module, dendrites: int, seed: int) -> dict[str, Tensor]:
    """Return the state dict of `plain` with D dendrites whose links are not zero.

    With links of zero, as after growing, a provider that left dendrites out would pass the gate.
    """
    model = pbfx.transform(plain, dataclasses.replace(CONFIG, seed=seed))
    if dendrites:
        pbfx.grow(model, dendrites)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if name.endswith(("dendrites.to_soma", "dendrites.to_dendrite")):
            links = 0.1 * torch.randn(tensor.shape, generator=generator)
            if name.endswith("to_dendrite"):
                # Only the strictly lower triangle is read: dendrites feed younger ones.
                older = torch.ones(tensor.shape[:2]).tril(-1)
                links = links * older[..., None]
            tensor.copy_(links)
    return state


def _plain(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
    return plain, sgd(plain)


def _pbfx(config: pbfx.Config) -> Callable[[nn.Module, Mapping[str, Tensor], int], Built]:
    def build(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
        model = pbfx.transform(plain, config)
        model.load_state_dict(state)
        return model, sgd(model)

    return build


def _candidates(count: int) -> Callable[[nn.Module, Mapping[str, Tensor], int], Built]:
    config = dataclasses.replace(CONFIG, candidates=count)

    def build(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
        model, optimizer = _pbfx(config)(plain, state, dendrites)
        policy = pbfx.Interval(neuron_epochs=1, dendrite_epochs=_FOREVER)
        tracker = pbfx.Tracker(model, optimizer, policy=policy, max_dendrites=dendrites + 1)
        step = tracker.step(0.0)
        assert step.phase is pbfx.Phase.DENDRITE, step.reason
        # The hooks that learn belong to the tracker: it lives as long as the model.
        model.__dict__["benchmark_tracker"] = tracker
        return model, optimizer

    return build


def _loop(frozen: bool) -> Callable[[nn.Module, Mapping[str, Tensor], int], Built]:
    def build(plain: nn.Module, state: Mapping[str, Tensor], dendrites: int) -> Built:
        model = loop.loop_of(plain, dendrites, frozen)
        loop.copy_weights(model, state)
        return model, sgd(model)

    return build


def _pbfx_gradients(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _candidates_gradients(model: nn.Module) -> Gradients:
    """Return gradients that leaked into the frozen network, and a mark per pool without an error.

    The reference is empty, so anything here is a fault.
    """
    pools = {n: m for n, m in model.named_modules() if isinstance(m, Candidates)}
    own = {id(p) for pool in pools.values() for p in pool.parameters()}
    found = {
        name: p.grad
        for name, p in model.named_parameters()
        if id(p) not in own and p.grad is not None
    }
    # The learner takes every gradient away and leaves zeros on `moments`: so it has been there.
    untouched = {f"{n}.moments": p.moments for n, p in pools.items() if p.moments.grad is None}
    return found | untouched


LOOP, LOOP_FROZEN, CANDIDATES = "loop, full", "loop, frozen", "pbfx candidates"


def _full(dendrites: int) -> float:
    return dendrites + 1.0


def _perforated(dendrites: int) -> float:
    return (dendrites + 3) / 3


def candidates_provider(count: int) -> Provider:
    """Return the dendrite phase with `count` candidates per neuron."""
    return Provider(
        CANDIDATES,
        _candidates(count),
        lambda dendrites: (dendrites + 2 + 2 * count) / 3,
        _candidates_gradients,
        cycle=CONFIG.measure_every,
        warmup=CONFIG.priming_batches + CONFIG.measure_every,
    )


PROVIDERS: tuple[Provider, ...] = (
    Provider("plain", _plain, lambda _: 1.0),
    Provider("pbfx perforated", _pbfx(CONFIG), _perforated, _pbfx_gradients, LOOP_FROZEN),
    Provider("pbfx gradient", _pbfx(GRADIENT), _full, _pbfx_gradients, LOOP),
    candidates_provider(CONFIG.candidates),
    Provider(LOOP_FROZEN, _loop(frozen=True), _perforated, loop.gradients),
    Provider(LOOP, _loop(frozen=False), _full, loop.gradients),
)
