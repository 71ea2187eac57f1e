"""Find the places in a graph that can carry dendrites, and say why the others cannot.

A site is a linear or conv op, transposed ones included, whose weight belongs to a module. It may be
called as a module or as a function, once or several times; all calls with one weight share one set
of dendrites. A norm that alone reads the op's output belongs to the site. Describing reads a graph
and nothing else; choosing applies the user's patterns to the sites of all parts of a model at once.
"""

from torch import nn

from pbfx.sites.adapters import folded_weights
from pbfx.sites.channels import channels_together, on_channels, rows_of, why_no_subset
from pbfx.sites.choose import choose_sites
from pbfx.sites.describe import describe_sites
from pbfx.sites.functions import is_transpose, read_call, read_input, soma_weight
from pbfx.sites.layers import is_site_module, why_no_layer
from pbfx.sites.norms import Join, find_join, held_norm, is_permutation
from pbfx.sites.site import Padding, Site, Skipped, Subset, convolution_form, leaves
from pbfx.sites.unfold import UNFOLDABLE, graph_of_cell, is_cell, unfold


def is_op(module: nn.Module) -> bool:
    """Return whether `module` by itself can carry dendrites: a linear or conv layer, or a cell."""
    return is_site_module(module) or is_cell(module)


__all__ = [
    "UNFOLDABLE",
    "Join",
    "Padding",
    "Site",
    "Skipped",
    "Subset",
    "channels_together",
    "choose_sites",
    "convolution_form",
    "describe_sites",
    "find_join",
    "folded_weights",
    "graph_of_cell",
    "held_norm",
    "is_cell",
    "is_op",
    "is_permutation",
    "is_site_module",
    "is_transpose",
    "leaves",
    "on_channels",
    "read_call",
    "read_input",
    "rows_of",
    "soma_weight",
    "unfold",
    "why_no_layer",
    "why_no_subset",
]
