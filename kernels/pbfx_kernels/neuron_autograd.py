"""`pbfx::perforated_linear` in eager mode, without the dispatcher; see `once`.

Of few rows, soma and dendrites are one short kernel, and the dispatcher and its autograd would be
most of what a step costs.
"""

from pbfx_kernels import neuron_op as op
from pbfx_kernels.once import in_eager_mode

apply = in_eager_mode("_Neurons", op.evaluate, op.remember, op.differentiate)
