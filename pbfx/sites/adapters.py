"""Weights that an adapter will fold into the layer that it adapts.

`peft`'s layers keep theirs beside the base layer and list them in `adapter_layer_names`; `merge`
multiplies the matrices into the base layer's weight and stops calling them. A dendrite on one of
these would be lost then, without a word, so they carry none unless they are asked for by name.
"""

from __future__ import annotations

from torch import nn

from pbfx.paths import join

REASON = "an adapter's weight, which merging folds into its base layer; name it in include"


def folded_weights(root: nn.Module) -> frozenset[str]:
    """Return the paths in `root` at which adapters keep what `merge` folds away."""
    return frozenset(
        join(path, name)
        for path, module in root.named_modules()
        for name in getattr(type(module), "adapter_layer_names", ())
        if isinstance(name, str)
    )
