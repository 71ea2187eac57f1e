"""Capture a model as graphs, without touching the model.

Symbolic tracing runs a `forward` once with stand-ins for its inputs, and whatever is not a stand-in
becomes a constant of the graph. Each way in which that could change the meaning unnoticed is closed
here, by recording it or by refusing:

- `self.training` is recorded as a node, so `F.dropout(x, training=self.training)` follows `train()`
  and `eval()`;
- buffers are recorded, so arithmetic on them is not folded;
- questions about a stand-in's type or attributes, which a stand-in would answer wrongly, are
  refused (`stand_ins`), and so are questions about torch's modes;
- random draws, assignments, no_grad, autocast and checkpoint blocks, and functions with a backward
  of their own are refused where tracing would hold on to one draw, drop the assignment, or lose the
  rest (`guards`);
- so is a `forward` that asks whether an optional argument is None, because no stand-in ever is.

What refuses keeps its own forward, and the modules inside are captured instead (`ladder`). On
request torch.export captures the whole model instead, for calls like an example (`exported`).
"""

from pbfx.capture.clone import REGISTRIES, python_modules, redirect, shared_clone
from pbfx.capture.exported import Example
from pbfx.capture.guards import CONSTANT
from pbfx.capture.ladder import Capture, Captured, Rung, capture, capture_clone
from pbfx.capture.trace import is_torch_layer

__all__ = [
    "CONSTANT",
    "REGISTRIES",
    "Capture",
    "Captured",
    "Example",
    "Rung",
    "capture",
    "capture_clone",
    "is_torch_layer",
    "python_modules",
    "redirect",
    "shared_clone",
]
