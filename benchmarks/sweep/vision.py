"""Models of torchvision and timm: their names, families, and inputs that fit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweep.subject import Name, NotBuilt, Subject, check_size

Inputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
# Small pictures first: a sweep wants many models, not many pixels. What needs more gets more.
_SIZES = (64, 128)
_BATCH = 2
# Words in a timm name, from small to large; a family is represented by its smallest members first.
_SCALES = {
    word: rank
    for rank, words in enumerate(
        (
            "test zepto atto femto pico",
            "nano micro mini xxs xxt n",
            "xs xt tiny t",
            "small lite s",
            "medium m",
            "base b",
            "plus large big l",
            "xlarge huge giant gigantic xl xxl h g so400m",
        )
    )
    for word in words.split()
}


def torchvision_names() -> list[Name]:
    """Return every model of torchvision, family by family."""
    from torchvision import models

    names = []
    for model in models.list_models():
        module = models.get_model_builder(model).__module__
        names.append(Name("torchvision", model, module.removeprefix("torchvision.models.")))
    return names


def build_torchvision(name: str) -> Subject:
    """Build one model of torchvision and run it.

    Raises:
        NotBuilt: if the library cannot, or it does not run.
    """
    from torchvision import models

    module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    extra: dict[str, Any] = {"weights": None}
    kind = module.partition(".")[0]
    if kind in ("detection", "segmentation"):
        extra["weights_backbone"] = None
    if kind == "detection" and not module.startswith("detection.ssd"):
        extra |= {"min_size": 64, "max_size": 96}
    if name in ("googlenet", "inception_v3"):
        extra["init_weights"] = False
    with _on_meta():
        check_size(_parameters(models.get_model(name, **extra)))
    model = models.get_model(name, **extra)
    if kind == "detection":
        return _settle(model, [("64 px", lambda size: _detection(64, "keypoint" in name))])
    if kind == "optical_flow":
        # Twelve refinements by default, all alike.
        refined = {"num_flow_updates": 2}
        return _settle(model, [("two frames of 128 px", lambda _: (_pictures(128, 2), refined))])
    if kind == "video":
        tries = [(8, 64), (16, 224)] if "mvit" not in name else [(16, 224)]
        return _settle(
            model,
            [
                (f"{frames} frames of {size} px", lambda _, f=frames, s=size: (_clip(f, s), {}))
                for frames, size in tries
            ],
        )
    return _settle(
        model, [(f"{s} px", lambda _, s=s: (_pictures(s), {})) for s in (*_SIZES, 224, 299)]
    )


def timm_names() -> list[Name]:
    """Return every model of timm, the smallest of each family first."""
    import timm

    names = []
    for family in timm.list_modules():
        models = sorted(timm.list_models(module=family), key=_scale)
        names += [Name("timm", model, family) for model in models]
    return names


def build_timm(name: str) -> Subject:
    """Build one model of timm and run it.

    Raises:
        NotBuilt: if the library cannot, or it does not run.
    """
    import timm

    with _on_meta():
        check_size(_parameters(timm.create_model(name, pretrained=False)))
    model = timm.create_model(name, pretrained=False)
    check_size(_parameters(model))
    config = getattr(model, "pretrained_cfg", {})
    channels, size, _ = config.get("input_size", (3, 224, 224))
    small = [s for s in _SIZES if s < size and not config.get("fixed_input_size")]
    least = max(config.get("min_input_size") or (0, 0, 0))
    sizes = [s for s in small if s >= least] + [size]
    return _settle(
        model, [(f"{s} px", lambda _, s=s: (_pictures(s, 1, channels), {})) for s in sizes]
    )


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Build what is built in the body without memory; a few constructors cannot, and are let go."""
    # They read values of their own tensors, which meta tensors have not.
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        yield


def _scale(name: str) -> tuple[int, int, str]:
    words = re.split(r"[_.]", name)
    ranks = [_SCALES[word] for word in words if word in _SCALES]
    numbers = [int(n) for n in re.findall(r"\d+", "_".join(words[:2]))]
    return min(ranks, default=_SCALES["small"]), min(numbers, default=0), name


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _settle(model: nn.Module, tries: list[tuple[str, Inputs]]) -> Subject:
    """Return the model with the first inputs on which it runs in both modes."""
    fault: Exception | None = None
    for settings, make in tries:
        try:
            train, evaluate = make(0), make(0)
            for training, (args, kwargs) in ((True, train), (False, _without_targets(evaluate))):
                with torch.no_grad():
                    model.train(training)(*args, **kwargs)
        except Exception as error:
            fault = error
            continue
        return Subject(model, settings, train, _without_targets(evaluate))
    raise NotBuilt(f"the plain model does not run: {type(fault).__name__}: {fault}")


def _without_targets(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = arguments
    return args, {name: value for name, value in kwargs.items() if name != "targets"}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _pictures(size: int, count: int = 1, channels: int = 3) -> tuple[Tensor, ...]:
    return tuple(_normal(count, _BATCH, channels, size, size))


def _clip(frames: int, size: int) -> tuple[Tensor]:
    # A large clip is work enough by itself.
    return (_normal(_BATCH if size <= _SIZES[0] else 1, 3, frames, size, size),)


def _detection(size: int, keypoints: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def target() -> Iterator[tuple[str, Tensor]]:
        yield "boxes", torch.tensor([[4.0, 4.0, 40.0, 50.0], [10.0, 20.0, 60.0, 60.0]])
        yield "labels", torch.tensor([1, 1])
        yield "masks", torch.ones(2, size, size, dtype=torch.uint8)
        if keypoints:
            yield "keypoints", torch.tensor([20.0, 30.0, 1.0]).repeat(2, 17, 1)

    pictures = [picture.sigmoid() for picture in _normal(_BATCH, 3, size, size)]
    return (pictures,), {"targets": [dict(target()) for _ in pictures]}
