"""Small configurations of transformers models, by rules over the names of their settings.

A library of five hundred architectures has no size that fits all. Three sizes are tried in turn:
narrow and shallow; shallow at the library's own width; the library's own defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

LAYERS, HEADS, HEAD_SIZE, VOCABULARY = 2, 4, 16, 512
WIDTH = HEADS * HEAD_SIZE
_DEPTH = re.compile(
    r"(num|n|encoder|decoder|num_encoder|num_decoder|num_hidden|.*_num|num_.*)?_?(hidden_)?"
    r"(layers?|blocks)"
)
_HEADS = re.compile(r".*(attention_heads|n_heads?|num_heads|num_(encoder|decoder)_heads)")
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "hidden_dim",
    "encoder_hidden_size",
)
_WIDE = re.compile(r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|hidden_dim)")
_EXPERTS = re.compile(r".*(num_(local_|routed_)?experts|n_routed_experts)")
_CHOSEN = re.compile(r".*(experts_per_tok(en)?|moe_top_?k|top_k_experts|router_top_?k)")
# Convolution stacks and pyramids keep their widths: their lists depend on one another.
_NOT_DEPTH = re.compile(
    r".*(conv|feat|every|interval|step|freq|offset|start|skip|mtp|nextn|index).*"
)
_TOKENS = re.compile(r".*_token_(id|index)")

Rule = Callable[[str, Any], Any]


def narrow(name: str, value: Any) -> Any:
    """Return a small value for a setting: few layers, small widths, few words."""
    value = shallow(name, value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r".*(key_value_heads|kv_heads)", name):
        return min(value, HEADS // 2)
    if _HEADS.fullmatch(name):
        return min(value, HEADS)
    if name in ("head_dim", "d_kv", "v_head_dim", "qk_head_dim"):
        return HEAD_SIZE
    if name in _WIDTHS:
        return min(value, WIDTH)
    if _WIDE.fullmatch(name):
        return min(value, 2 * WIDTH)
    return value


def shallow(name: str, value: Any) -> Any:
    """Return a value for a setting that keeps widths: few layers, few words, few experts."""
    if isinstance(value, list):
        if name == "layer_types" or name.endswith("_layer_types"):
            return _kinds(value)
        if name in ("depths", "num_layers", "layers") and all(isinstance(v, int) for v in value):
            return [min(v, 1) for v in value]
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if "vocab_size" in name and "type" not in name:
        return min(value, VOCABULARY)
    if _TOKENS.fullmatch(name) and value >= VOCABULARY:
        return VOCABULARY - 1 - value % 16
    if _DEPTH.fullmatch(name) and not _NOT_DEPTH.fullmatch(name):
        return min(value, LAYERS)
    if _EXPERTS.fullmatch(name):
        return min(value, HEADS)
    if _CHOSEN.fullmatch(name):
        return min(value, HEADS // 2)
    if name in ("n_group", "topk_group", "num_expert_group"):
        return min(value, 1)
    return value


def _kinds(layers: list[Any]) -> list[Any]:
    """Return one entry per layer that is left, of as many kinds as there is room for."""
    kinds = list(dict.fromkeys(layers))
    # Models look for a layer of full attention to make their masks and rotations.
    kinds.sort(key=lambda kind: kind == "full_attention")
    kinds = kinds[-LAYERS:]
    return [*kinds, *[kinds[-1]] * (LAYERS - len(kinds))] if kinds else layers


def unchanged(_: str, value: Any) -> Any:
    """Return the library's own value."""
    return value


SIZES: dict[str, Rule] = {"narrow": narrow, "shallow": shallow, "default": unchanged}
# Random masks over time are longer than the short inputs here.
_OFF = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False}


def configure(config_class: type, rule: Rule) -> Any:
    """Return a configuration whose settings, and those of its parts, went through `rule`."""
    default = config_class()
    return config_class(**_settings(default, rule))


def _settings(config: Any, rule: Rule) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "model_type"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed[name] = {"model_type": value.model_type} | _settings(value, rule)
        elif name in _OFF:
            changed[name] = _OFF[name]
        else:
            new = rule(name, value)
            if new is not value and new != value:
                changed[name] = new
    return changed
