"""`pbfx::dendrites` in eager mode, without the dispatcher; see `once`."""

from pbfx_kernels import dendrite_op as op
from pbfx_kernels.once import in_eager_mode

apply = in_eager_mode("_Dendrites", op.evaluate, op.remember, op.differentiate)
