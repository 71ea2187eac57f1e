"""The passes, one a file; `pbfx.pipeline` holds their order and runs them."""

from pbfx.passes.attach_candidates import attach_candidates
from pbfx.passes.drop_reads import drop_reads
from pbfx.passes.fuse_neurons import fuse_neurons
from pbfx.passes.hold_eval import hold_eval
from pbfx.passes.insert_dendrites import insert_dendrites
from pbfx.passes.pack_dendrites import pack_dendrites
from pbfx.passes.unfold_layers import unfold_layers

__all__ = [
    "attach_candidates",
    "drop_reads",
    "fuse_neurons",
    "hold_eval",
    "insert_dendrites",
    "pack_dendrites",
    "unfold_layers",
]
