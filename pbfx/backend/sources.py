"""What Dynamo says of a graph's inputs, for graphs that are made of it: where they come from.

AOTAutograd then knows which of them are parameters, that stay where they are: a backward may keep
them for nothing, and a CUDA graph need not copy them at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

# Beside tensors of which nothing is known, what Dynamo says of one is in its metadata.
_TOLD = "tensor_dict"
_STATIC = "_dynamo_static_input_type"


def keep_sources(
    gm: fx.GraphModule,
    made: fx.GraphModule,
    inputs: Sequence[fx.Node],
    given: Sequence[fx.Node | None],
) -> None:
    """Tell of the inputs of a graph what Dynamo told of those of the graph that it was made of.

    Args:
        gm: a graph of Dynamo's; any other is nothing to tell of.
        made: a copy of it, or of a part; edited in place.
        inputs: placeholders of `made`.
        given: for each the placeholder of `gm` that it stands for; None for what `gm` computes.
    """
    made.meta.update(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(made, name, getattr(gm, name))
    for node, original in zip(inputs, given, strict=True):
        if original is None:
            node.meta.pop(_TOLD, None)
            node._dynamo_source = None  # pyright: ignore[reportAttributeAccessIssue]
        elif hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source


def is_static(node: fx.Node) -> bool:
    """Return whether Dynamo has said of this input that it stays where it is."""
    return bool(node.meta.get(_TOLD, {}).get(_STATIC))
