"""Which strategy for which site, and what the choice promises."""

import dataclasses
import logging

import pytest
import torch
from kernel_cases import BY_NAME, make_dendrites
from torch.utils.flop_counter import FlopCounterMode

import pbfx_kernels.flops
from pbfx_kernels import LINEAR, Geometry, dendrites, strategy
from pbfx_kernels.fused_configs import conv_neuron_blocks, neuron_blocks
from pbfx_kernels.layout import Grid, grid_of, is_regular
from pbfx_kernels.problem import Problem
from pbfx_kernels.strategy import Strategy, choose
from pbfx_kernels.walking import merged_stride

H200 = Problem("cuda", (9, 0), torch.bfloat16, False, LINEAR, 65536, 256, 64, 1, 3)


def but(**changes: object) -> Problem:
    return dataclasses.replace(H200, **changes)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (H200, True),
        (but(dendrites=4), False),
        (but(dendrites=2), True),
        (but(dendrites=2, channels=768), False),
        (but(positions=2048), False),
        (but(positions=8192, channels=4096), False),
        (but(capability=(8, 0)), False),
        # Without TF32 the kernel would round what the user wants exact.
        (but(dtype=torch.float32), False),
        (but(dtype=torch.float32, tf32=True), True),
        (but(dtype=torch.float32, tf32=True, channels=256), True),
        (but(dtype=torch.float32, tf32=True, channels=768), False),
        (but(dtype=torch.float32, tf32=True, dendrites=4), False),
        (but(dtype=torch.float64, tf32=True), False),
    ],
    ids=str,
)
def test_where_linear_somas_are_fused(problem: Problem, expected: bool) -> None:
    assert strategy.fuses(problem) is expected


MNIST = but(geometry=Geometry.convolution(2), channels=32, taps=9, channels_last=False)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (MNIST, Strategy.SPLIT),
        (dataclasses.replace(MNIST, dtype=torch.float32, tf32=True), Strategy.SPLIT),
        # Rounded to TF32 against the user's will.
        (dataclasses.replace(MNIST, dtype=torch.float32), Strategy.PACKED),
        (dataclasses.replace(MNIST, dendrites=6), Strategy.PACKED),
        (dataclasses.replace(MNIST, channels=128), Strategy.PACKED),
        (dataclasses.replace(MNIST, capability=(8, 0)), Strategy.PACKED),
        (dataclasses.replace(MNIST, dtype=torch.float64), Strategy.REFERENCE),
        (but(channels=4096), Strategy.PACKED),
    ],
    ids=str,
)
def test_a_backward_that_recomputes_writes_no_preactivations(
    problem: Problem, expected: Strategy
) -> None:
    assert strategy.choose_again(problem) is expected


CONV = but(geometry=Geometry.convolution(2, padding=1), channels=128, taps=9)
TF32 = dataclasses.replace(CONV, dtype=torch.float32, tf32=True)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (CONV, True),
        (dataclasses.replace(CONV, channels=512), False),
        (TF32, True),
        (dataclasses.replace(TF32, tf32=False), False),
        (dataclasses.replace(TF32, channels=256), False),
        (dataclasses.replace(TF32, channels=1024, taps=1), True),
        (dataclasses.replace(TF32, dendrites=4), False),
        # Groups were measured in 16 bits only.
        (dataclasses.replace(CONV, geometry=Geometry.convolution(2, groups=4)), True),
        (dataclasses.replace(TF32, geometry=Geometry.convolution(2, groups=4)), False),
    ],
    ids=str,
)
def test_where_convolutional_somas_are_fused(problem: Problem, expected: bool) -> None:
    assert strategy.fuses(problem) is expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (but(positions=1, neurons=4096, channels=4096), True),
        (but(positions=64, neurons=16384, channels=4096, dendrites=7), True),
        (but(positions=128, neurons=128, channels=9216), True),
        (but(positions=128, neurons=10, channels=128, dendrites=1), True),
        (but(positions=256, neurons=1024, channels=4096), True),
        (but(positions=512, neurons=4096, channels=1024), True),
        # More to multiply than to read.
        (but(positions=256, neurons=4096, channels=4096), False),
        (but(positions=512, neurons=4096, channels=1040), False),
        (but(positions=513), False),
        # Rows that start anywhere, or where Triton cannot tell.
        (but(positions=1, channels=999), False),
        (but(positions=300, neurons=1000, channels=1000), False),
        (but(positions=1, channels=16), True),
        (but(positions=1, channels=8, dtype=torch.float32, tf32=True), False),
        (but(positions=512, neurons=1024, channels=1024, dtype=torch.float32, tf32=True), True),
        (but(positions=256, neurons=4096, channels=1024, dtype=torch.float32, tf32=True), False),
        (but(positions=1, dtype=torch.float32), False),
        (but(positions=1, dtype=torch.float64), False),
        (but(positions=1, capability=(8, 0)), True),
        (but(positions=1, capability=(7, 5)), False),
        (but(positions=1, device="cpu", capability=None), False),
        (but(positions=1, dendrites=0), False),
        (but(positions=1, dendrites=8), False),
        (but(positions=0), False),
        (but(positions=1, neurons=0), False),
        (but(positions=1, channels=0), False),
        (but(positions=1, geometry=Geometry.convolution(2)), False),
    ],
    ids=str,
)
def test_where_weights_are_streamed(problem: Problem, expected: bool) -> None:
    assert strategy.streams(problem) is expected
    assert strategy.can_stream(problem) or not expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (H200, Strategy.SPLIT),
        (but(channels=4096), Strategy.PACKED),
        (but(channels=2048, positions=256), Strategy.SPLIT),
        (but(channels=2048, positions=1), Strategy.PACKED),
        (but(dtype=torch.float32), Strategy.PACKED),
        (but(dtype=torch.float32, tf32=True), Strategy.PACKED),
        (but(dtype=torch.float32, tf32=True, positions=99), Strategy.SPLIT),
        (but(geometry=Geometry.convolution(2), taps=9), Strategy.SPLIT),
        *[
            (but(geometry=Geometry.convolution(2), capability=capability, **site), expected)
            for site, hopper, ampere in (
                ({"taps": 9}, Strategy.SPLIT, Strategy.SPLIT),
                ({"taps": 9, "channels_last": False}, Strategy.SPLIT, Strategy.PACKED),
                ({"taps": 9, "channels": 32}, Strategy.SPLIT, Strategy.PACKED),
                ({"taps": 9, "channels": 128}, Strategy.PACKED, Strategy.PACKED),
                ({"taps": 9, "dendrites": 2}, Strategy.SPLIT, Strategy.SPLIT),
                ({"taps": 9, "dendrites": 1}, Strategy.PACKED, Strategy.SPLIT),
                (
                    {"taps": 9, "dendrites": 2, "channels_last": False},
                    Strategy.PACKED,
                    Strategy.PACKED,
                ),
                ({"channels": 256, "dendrites": 1}, Strategy.SPLIT, Strategy.PACKED),
                ({"channels": 256}, Strategy.SPLIT, Strategy.PACKED),
                ({"channels": 512}, Strategy.PACKED, Strategy.PACKED),
                # What the kernel of *fused* does not know, or was not measured for.
                ({"taps": 9, "channels": 12}, Strategy.PACKED, Strategy.PACKED),
                ({"channels": 256, "dendrites": 4}, Strategy.PACKED, Strategy.PACKED),
                (
                    {"channels": 256, "dtype": torch.float32, "tf32": True},
                    Strategy.PACKED,
                    Strategy.PACKED,
                ),
            )
            for capability, expected in (((9, 0), hopper), ((8, 0), ampere))
        ],
        (but(geometry=Geometry.convolution(2, stride=2)), Strategy.PACKED),
        (but(geometry=Geometry.convolution(2, groups=4), channels=16), Strategy.PACKED),
        (but(geometry=Geometry.convolution(2), channels=3, taps=49), Strategy.SPLIT),
        (
            but(
                geometry=Geometry.convolution(2),
                channels=1,
                taps=9,
                dtype=torch.float32,
                tf32=True,
            ),
            Strategy.SPLIT,
        ),
        (but(dendrites=6), Strategy.PACKED),
        (but(dendrites=9), Strategy.REFERENCE),
        (but(dendrites=0), Strategy.REFERENCE),
        (but(positions=0), Strategy.REFERENCE),
        (but(dtype=torch.float64), Strategy.REFERENCE),
        (but(capability=(7, 5)), Strategy.REFERENCE),
        (but(capability=None), Strategy.REFERENCE),
        (but(capability=(12, 0)), Strategy.SPLIT),
        (but(device="cpu", capability=None), Strategy.REFERENCE),
        (but(geometry=Geometry.convolution(3)), Strategy.PACKED),
        (but(geometry=Geometry.convolution(1)), Strategy.PACKED),
        (but(geometry=Geometry.convolution(2, groups=256)), Strategy.PACKED),
        (but(geometry=Geometry.convolution(2, groups=256), channels=1), Strategy.DEPTHWISE),
        (but(geometry=Geometry.convolution(1, groups=256), channels=1), Strategy.DEPTHWISE),
        (but(geometry=Geometry.convolution(2, groups=128), channels=1), Strategy.PACKED),
    ],
    ids=str,
)
def test_choice(problem: Problem, expected: Strategy) -> None:
    assert choose(problem) is expected


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("channels", [4, 8, 12, 16, 24, 40, 72, 128])
def test_steps_are_as_deep_as_a_product_must_be(channels: int, size: int) -> None:
    # Triton 3.6 refuses products of fewer than 16 inputs, of 32-bit elements too.
    linear = neuron_blocks(65536, 64, channels, 3, size)
    convolutions = [conv_neuron_blocks(65536, 64, channels, d, size, soma=d < 3) for d in (1, 3)]
    assert min(blocks.inputs for blocks in (linear, *convolutions)) >= 16
    divided = conv_neuron_blocks(65536, 64, channels, 3, size, whole=False)
    problem = but(
        geometry=Geometry.convolution(2, groups=2),
        taps=9,
        channels=channels,
        dtype=torch.float32 if size == 4 else torch.bfloat16,
        tf32=True,
    )
    # A step that reads past the channels of a group reads those of the next one.
    walked = strategy.route(problem, (2, 2 * channels, 256, 128)) is strategy.Route.WALKED
    assert walked == (channels % divided.inputs == 0)


def test_what_is_chosen_can_be_run() -> None:
    for inputs in (1, 64, 1024, 9216):
        for positions in (1, 128, 65536):
            for d in range(1, 9):
                for geometry in (
                    LINEAR,
                    Geometry.convolution(2),
                    Geometry.convolution(2, groups=8),
                ):
                    problem = but(
                        channels=inputs, positions=positions, dendrites=d, geometry=geometry
                    )
                    if choose(problem) is Strategy.SPLIT:
                        assert strategy.can_split(problem)


def test_a_fallback_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    strategy._say_once.cache_clear()
    args = make_dendrites(BY_NAME["linear"], 2).args()
    with caplog.at_level(logging.INFO, "pbfx_kernels"):
        dendrites(**args)
        dendrites(**args)
    assert [record.message for record in caplog.records] == [
        "sites run the reference, in plain torch: there are no kernels for devices of type 'cpu'"
    ]


def test_a_gpu_that_was_not_measured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    strategy._say_unmeasured_once.cache_clear()
    with caplog.at_level(logging.INFO, "pbfx_kernels"):
        for capability in ((9, 0), (8, 6), (8, 6)):
            assert choose(but(capability=capability)) is Strategy.SPLIT
    assert [record.message for record in caplog.records] == [
        "kernels are chosen as on Hopper, for compute capability 8.6 was not measured; "
        "pbfx_kernels.measure() chooses by time"
    ]


def test_kept_activations_are_the_callers_choice() -> None:
    site = BY_NAME["conv2d-form"]
    args = make_dendrites(site, 2).args()
    out, activations = dendrites(**args, geometry=site.geometry)
    with torch.no_grad():
        lean, none = dendrites(**args, geometry=site.geometry, keep=False)
    assert torch.equal(lean, out)
    assert activations.shape == (2, *out.shape)
    assert none.shape == (0, *out.shape)


@pytest.mark.parametrize("name", ["linear-63-127", "conv2d-form", "conv2d-unbatched", "conv1d"])
def test_recomputing_backward(name: str) -> None:
    site = BY_NAME[name]
    args = make_dendrites(site, 3).args()
    form = ("tanh", *site.op_geometry)
    tensors = list(args.values())
    kept, _ = torch.ops.pbfx.dendrites.default(*tensors, *form, True)
    grad = torch.randn_like(kept)
    (wanted,) = torch.autograd.grad(kept, args["to_soma"], grad)
    lean, none = torch.ops.pbfx.dendrites.default(*tensors, *form, False)
    assert none.shape == (0, *lean.shape)
    found = torch.autograd.grad(lean, (args["soma"], args["to_soma"]), grad)
    assert torch.equal(found[0], grad)
    assert torch.equal(found[1], wanted)


@pytest.mark.parametrize("name", ["linear", "linear-unbatched", "conv2d-form", "conv2d-unbatched"])
@pytest.mark.parametrize("d", [0, 2])
def test_opcheck_without_activations(name: str, d: int) -> None:
    site = BY_NAME[name]
    args = make_dendrites(site, d, bias=d != 0).args(torch.float32)
    ops = torch.ops.pbfx
    form = ("silu", *site.op_geometry)
    torch.library.opcheck(ops.dendrites.default, (*args.values(), *form, False))
    plain = {name: None if t is None else t.detach() for name, t in args.items()}
    tensors = (plain[name] for name in ("soma", "x", "weight", "bias", "to_dendrite"))
    torch.library.opcheck(ops.dendrites_recompute.default, (*tensors, *form))


class _OnGpu(torch.Tensor):
    """What `recomputes` asks a tensor for, on a machine without a GPU."""

    device = torch.device("cuda")


def test_what_is_saved() -> None:
    """Convolutions with few inputs save what the soma saves anyway; the others activations."""
    soma = torch.empty(0).as_subclass(_OnGpu)
    conv = Geometry.convolution(2)

    def recomputes(*weight: int, geometry: Geometry = conv) -> bool:
        return strategy.recomputes(soma, torch.empty(weight, device="meta"), geometry)

    assert recomputes(2, 64, 32, 3, 3)
    assert not recomputes(1, 64, 32, 3, 3)
    # Whose weight's gradient needs the same inputs.
    assert recomputes(1, 64, 1, 3, 3, geometry=Geometry.convolution(2, groups=64))
    assert not recomputes(2, 64, 32, 1, 1)
    assert not recomputes(2, 64, 256, 3, 3)
    assert not recomputes(2, 64, 32, geometry=LINEAR)
    assert not strategy.recomputes(torch.empty(0), torch.empty(2, 4, 3, 3, 3), conv)
    soma = soma.double().as_subclass(_OnGpu)
    assert not recomputes(2, 64, 32, 3, 3)


def test_flops() -> None:
    assert pbfx_kernels.flops.stacked_flops((5, 6), (5, 4), (3, 6, 4)) == 2 * 3 * 5 * 6 * 4
    site = BY_NAME["conv2d-form"]
    args = make_dendrites(site, 3).args(torch.float32)
    with FlopCounterMode(display=False) as stacked:
        out, _ = dendrites(**args, geometry=site.geometry)
    with FlopCounterMode(display=False) as soma:
        site.soma(args["x"], args["weight"][0], None)
    assert stacked.get_total_flops() == 3 * soma.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 0


def test_grids() -> None:
    nchw = torch.empty(2, 5, 3, 4)
    nhwc = nchw.to(memory_format=torch.channels_last)
    assert grid_of(-3, nchw) == Grid(24, 5, 12, ((60, 1, 12),))
    assert grid_of(-3, nhwc) == Grid(24, 5, 1, ((5, 0, 1),))
    assert grid_of(-3, nhwc, nchw) == Grid(24, 5, 12, ((60, 5, 1), (60, 1, 12)))
    assert grid_of(-1, torch.empty(7, 3).t()) == Grid(3, 7, 1, ((1, 0, 3),))
    assert grid_of(-1, torch.empty(7)) == Grid(1, 7, 1, ((0, 0, 1),))
    assert not is_regular(torch.empty(3, 2, 5).transpose(0, 1), -1)
    assert merged_stride((2, 1, 3), (6, 99, 2)) == 2
