"""What `mode` and `options` of `torch.compile` say, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import fx

from pbfx.errors import ConfigError, nearest
from pbfx.passes.lower_dendrites import STRATEGIES

PRECISIONS: dict[str, torch.dtype | None] = {
    "soma": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The compilers that may get the lowered graph: one that generates code, two that are quick.
COMPILERS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OWN = ("strategy", "precision", "regional", "compiler", "mode")

Compiled = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, list[Any]], Compiled]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user asked of the backend.

    Attributes:
        strategy: see `LoweringContext`.
        products: likewise.
        regional: what is compiled apart, equal ones once: nothing, blocks (True), or the dendrites
            of each site and what lies between (`"sites"`).
        compiler: who compiles the lowered graph.
        inner: the same, ready to be called.
    """

    strategy: str
    products: torch.dtype | None
    regional: bool | Literal["sites"]
    compiler: str
    inner: Compiler


def settings_of(mode: str | None, options: Mapping[str, Any] | None) -> Settings:
    """Check `mode` and `options`, and return what they say.

    Raises:
        ConfigError: naming every option that is unknown or has a value it cannot have.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"backend 'pbfx': options must be a dict, got {options!r}")
    given = dict(options or {})
    mode = given.get("mode", mode)
    strategy, precision = given.get("strategy", "auto"), given.get("precision", "soma")
    regional, compiler = given.get("regional", False), given.get("compiler", "inductor")
    inductor = {name: value for name, value in given.items() if name not in OWN}
    faults = [
        _unless(strategy in STRATEGIES, "strategy", strategy, STRATEGIES),
        _unless(precision in PRECISIONS, "precision", precision, PRECISIONS),
        _unless(compiler in COMPILERS, "compiler", compiler, COMPILERS),
        _unless(mode is None or mode in MODES, "mode", mode, MODES),
        ""
        if isinstance(regional, bool) or regional == "sites"
        else f"regional must be True, False or 'sites', got {regional!r}",
    ]
    if strategy == "kernel" and precision != "soma":
        faults.append(
            f"precision {precision!r} goes with strategy 'packed', 'looped' or 'auto': the "
            "kernels compute in the soma's dtype"
        )
    if compiler != "inductor" and (inductor or mode not in (None, "default")):
        rest = ", ".join(repr(name) for name in inductor) or f"mode {mode!r}"
        faults.append(f"{rest} is for compiler 'inductor', got compiler {compiler!r}")
    if any(faults):
        raise ConfigError("backend 'pbfx': " + "; ".join(fault for fault in faults if fault))
    inner = _inductor(mode, inductor) if compiler == "inductor" else _registered(compiler)
    if regional and getattr(inner, "config", {}).get("triton.cudagraphs"):
        raise ConfigError(
            "backend 'pbfx': regional cannot be combined with CUDA graphs (mode "
            f"{mode!r}): equal blocks share code, and a CUDA graph is bound to the addresses of "
            "one block's weights; drop one of the two"
        )
    return Settings(strategy, PRECISIONS[precision], regional, compiler, inner)


def _unless(fine: bool, name: str, value: Any, valid: Any) -> str:
    return "" if fine else f"{name} is unknown, got {value!r}: {nearest(str(value), valid)}"


def _inductor(mode: str | None, options: dict[str, Any]) -> Compiler:
    """Return what `torch.compile` itself would call with this mode and these options."""
    import torch._inductor.config

    known = torch._inductor.config.get_config_copy()
    unknown = sorted(name for name in options if name.replace("-", "_") not in known)
    if unknown:
        raise ConfigError(
            "backend 'pbfx': "
            + "; ".join(
                f"option {name!r} is neither ours nor Inductor's: {nearest(name, [*OWN, *known])}"
                for name in unknown
            )
        )
    try:
        wrapper: Any = torch._TorchCompileInductorWrapper(mode, options, None)
    # It raises this for a value of the wrong type.
    except RuntimeError as error:
        raise ConfigError(f"backend 'pbfx': Inductor refuses an option: {error}") from error
    from pbfx.backend.bare import CallBare

    last = "post_grad_custom_post_pass"
    wrapper.config[last] = CallBare(wrapper.config.get(last))
    return wrapper


def _registered(name: str) -> Compiler:
    from torch._dynamo import lookup_backend

    return lookup_backend(name)
