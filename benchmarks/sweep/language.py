"""Models of transformers: built from shrunk configurations, fed by the names of their arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweep.shrink import SIZES, configure
from benchmarks.sweep.subject import Name, NotBuilt, Subject, check_size

_BATCH, _LENGTH, _WAVE = 2, 12, 4000


def transformers_names() -> list[Name]:
    """Return every model type that `AutoModel` knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [Name("transformers", kind, kind) for kind in MODEL_MAPPING_NAMES]


def build_transformers(name: str) -> Subject:
    """Build one model from a small configuration and run it.

    Raises:
        NotBuilt: if no size of it can be built and run; with the reason for each size.
    """
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    faults = []
    for size, rule in SIZES.items():
        try:
            config = configure(config_class, rule)
            with torch.device("meta"):
                check_size(sum(p.numel() for p in AutoModel.from_config(config).parameters()))
            model = AutoModel.from_config(config)
            kwargs = _settle(model, config)
        # A generic shrinking breaks some configurations in ways that only their code knows.
        except Exception as error:
            faults.append(f"{size}: {type(error).__name__}: {error}")
            continue
        return Subject(model, f"{size} config", ((), kwargs), ((), kwargs))
    raise NotBuilt(" | ".join(fault[:120] for fault in faults))


def _settle(model: nn.Module, config: Any) -> dict[str, Any]:
    """Return inputs on which the model runs in both modes: what it asks for, else all it takes."""
    try:
        return _tried(model, inputs_for(model, config))
    except Exception as error:
        try:
            return _tried(model, inputs_for(model, config, everything=True))
        except Exception:
            raise error from None


def _tried(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    for training in (True, False):
        with torch.no_grad():
            model.train(training)(**kwargs)
    return kwargs


def inputs_for(model: nn.Module, config: Any, everything: bool = False) -> dict[str, Any]:
    """Return named arguments for `forward`, from its signature and the configuration.

    Raises:
        NotBuilt: if no rule makes an argument that has no default.
    """
    generator = torch.Generator().manual_seed(0)
    asked = inspect.signature(model.forward).parameters
    needed = {
        n for n, p in asked.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    }
    main = getattr(model, "main_input_name", "input_ids")
    wanted = needed | {main}
    if "input_ids" in asked and hasattr(config, "text_config") and "pixel_values" not in wanted:
        wanted.add("input_ids")
    if "decoder_input_ids" in asked and getattr(config, "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    made: dict[str, Any] = {}
    for name in asked:
        if name in _MAKERS and (name in wanted or everything):
            made[name] = _MAKERS[name](config, generator)
    if everything and "input_values" in made and made["input_values"].dim() == 2:
        made["input_values"] = made["input_values"][:, None]
    missing = wanted - made.keys() - {"kwargs"}
    if missing & needed:
        raise NotBuilt(f"no rule makes its arguments {', '.join(sorted(missing))}")
    return made


def find(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of these settings, of the configuration or of one of its parts."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    words = find(config, "vocab_size", "encoder_vocab_size", default=32)
    # Low numbers are often padding and the like.
    low = 5 if words > 16 else 0
    return torch.randint(low, min(words, 500), (_BATCH, _LENGTH), generator=generator)


def _side(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, dict):
        value = value.get("height", default)
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[-1])
    return (int(value), int(value)) if value else (default, default)


def _picture(config: Any, generator: torch.Generator) -> Tensor:
    height, width = _side(find(config, "image_size", "img_size"), 64)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = find(config, "num_frames")
    shape = (
        (_BATCH, frames, channels, height, width) if frames else (_BATCH, channels, height, width)
    )
    return torch.randn(shape, generator=generator)


def _clip(config: Any, generator: torch.Generator) -> Tensor:
    height, width = _side(find(config, "image_size", "crop_size", "img_size"), 64)
    frames = find(config, "num_frames", "frames_per_clip", default=8)
    return torch.randn(_BATCH, frames, 3, height, width, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor:
    bins = find(
        config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        default=80,
    )
    positions = find(config, "max_source_positions")
    # Whisper's kind reads (bins, frames) and insists on twice its positions.
    if positions and find(config, "num_mel_bins") and not find(config, "input_feat_per_channel"):
        return torch.randn(_BATCH, bins, 2 * positions, generator=generator)
    return torch.randn(_BATCH, 64, bins, generator=generator)


def _wave(config: Any, generator: torch.Generator) -> Tensor:
    bins, length = find(config, "num_mel_bins"), find(config, "max_length")
    if bins and length:
        return torch.randn(_BATCH, length, bins, generator=generator)
    channels = find(config, "audio_channels")
    shape = (_BATCH, channels, _WAVE) if channels else (_BATCH, _WAVE)
    return torch.randn(shape, generator=generator)


def _past(config: Any, generator: torch.Generator) -> Tensor:
    length = find(config, "context_length", default=32)
    channels = find(config, "num_input_channels", default=1)
    return torch.randn(_BATCH, length, channels, generator=generator)


def _boxes(config: Any, generator: torch.Generator) -> Tensor:
    return torch.tensor([0, 0, 9, 9]).expand(_BATCH, _LENGTH, 4).contiguous()


_MAKERS = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _picture,
    "pixel_values_videos": _clip,
    "input_features": _features,
    "input_values": _wave,
    "past_values": _past,
    "bbox": _boxes,
    "attention_mask": lambda config, _: torch.ones(_BATCH, _LENGTH, dtype=torch.long),
}
