"""The passes, one a file; `pbfx.pipeline` holds their order and runs them."""

from pbfx.passes.attach_candidates import attach_candidates
from pbfx.passes.hold_eval import hold_eval
from pbfx.passes.insert_dendrites import insert_dendrites
from pbfx.passes.unfold_layers import unfold_layers

__all__ = ["attach_candidates", "hold_eval", "insert_dendrites", "unfold_layers"]
