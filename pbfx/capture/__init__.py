"""Capture a model's graph without touching the model.

Symbolic tracing runs `forward` once with stand-ins for its inputs, and whatever is not a stand-in
becomes a constant of the graph. Each way in which that could change the meaning unnoticed is closed
here, by recording it or by an error:

- `self.training` is recorded as a node, so `F.dropout(x, training=self.training)` follows `train()`
  and `eval()`;
- buffers are recorded, so arithmetic on them is not folded;
- random draws, assignments, hooks, no_grad and autocast blocks, and functions with a backward of
  their own are errors where tracing would hold on to one draw, drop the assignment, or lose the
  rest (`guards`);
- so is a `forward` that asks whether an optional argument is None, because no stand-in ever is.
"""

from pbfx.capture.clone import shared_clone
from pbfx.capture.trace import capture

__all__ = ["capture", "shared_clone"]
