"""What takes the place of a site's ops in a lowered graph: modules over weights packed once.

    Neurons          y = W x + b + Σ_d T_d ⊙ a_d        soma and dendrites in one product
    FusedNeurons     likewise, in one kernel            where a GPU is faster so
    PackedDendrites  y = soma + Σ_d T_d ⊙ a_d           where the soma stays an op of its own

They are for inference: their parameters require no gradients, dendrites that reach nothing have
been left out, and the gradient to the input is that of the function, where a perforated site passes
none through its dendrites.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pbfx.dendrites import Dendrites
from pbfx.errors import ConfigError
from pbfx.sited import Sited, fit_form, keep_out_of_fast_paths, pad
from pbfx.sites import Site
from pbfx_kernels import Geometry, frozen
from pbfx_kernels.neurons import joined, neurons, pack, pack_bias


class Stacks(NamedTuple):
    """Stacked tensors of a site's dendrites, weights as the kernels take them."""

    weight: Tensor
    bias: Tensor | None
    to_soma: Tensor
    to_dendrite: Tensor


class _Packed(Sited):
    """The parameters that both kinds of packed site have."""

    def __init__(self, site: Site, activation: str, stacks: Stacks) -> None:
        super().__init__(site, stacks.weight.device)
        self.activation = activation
        self.weight = _frozen(self.lay(stacks.weight, site.geometry))
        self.bias = None if stacks.bias is None else _frozen(pack_bias(stacks.bias, site.geometry))
        self.to_soma = _frozen(stacks.to_soma)
        self.to_dendrite = _frozen(stacks.to_dendrite)
        keep_out_of_fast_paths(self)

    @staticmethod
    def lay(stacked: Tensor, geometry: Geometry) -> Tensor:
        """Return the one weight that is kept of stacked ones."""
        return pack(stacked, geometry)

    def extra_repr(self) -> str:
        """Show the op, N, D and the activation in the model's printout."""
        count, number = self.to_soma.shape
        return f"{self.site.op}, neurons={number}, dendrites={count}, {self.activation}"


class Neurons(_Packed):
    """Somas with their dendrites: one product over all their weights, and an epilogue.

    Args:
        site: whose neurons these are.
        weight: W, `site.shape`, with a norm that followed folded in.
        bias: b, (N,), likewise, or None.
        dendrites: of the site, or None where it has none.
        ranks: how many axes the input may have for the folded norm to be one over the neurons;
            empty where it always is.
    """

    def __init__(
        self,
        site: Site,
        weight: Tensor,
        bias: Tensor | None,
        dendrites: Dendrites | None,
        ranks: tuple[int, ...] = (),
    ) -> None:
        grown = stacks_of(site, weight, dendrites)
        offset = None if bias is None else bias.detach()[None]
        activation = "tanh" if dendrites is None else dendrites.activation
        super().__init__(
            site,
            activation,
            Stacks(
                torch.cat([site.op_weight(weight.detach()[None]), grown.weight]),
                _stacked_biases(offset, grown.bias, grown.weight.shape[0], site.neurons),
                grown.to_soma,
                grown.to_dendrite,
            ),
        )
        self.ranks = ranks

    def soma(self, role: str) -> Tensor | None:
        """Return the soma's own "weight" or "bias", shaped as the site's op has it, as a view."""
        stacked = 1 + self.to_soma.shape[0]
        form = self.site.geometry
        if role == "bias":
            if self.bias is None:
                return None
            return self.bias.view(form.groups, stacked, -1)[:, 0].flatten()
        if form.transposed:
            return self.weight[:, : self.weight.shape[1] // stacked]
        rows = self.weight.unflatten(0, (form.groups, stacked, -1))[:, 0].flatten(0, 1)
        return rows.mT if self.site.input_first else rows

    def forward(self, x: Tensor) -> Tensor:
        """Return the neurons' output.

        Args:
            x: what the soma read.

        Raises:
            ConfigError: if `x` has axes for which the norm would not be one over the neurons.
        """
        if self.ranks and x.dim() not in self.ranks:
            raise ConfigError(
                f"pbfx.lower has folded the norm behind {self.site.name!r} for inputs of "
                f"{' or '.join(map(str, self.ranks))} axes, where it normalises neurons; got one "
                f"of shape {tuple(x.shape)}. Lower with fold_norms=False for such inputs"
            )
        return self.evaluate(pad(x, self.site))

    def evaluate(self, x: Tensor) -> Tensor:
        """Return the neurons' output, from what the soma's op itself reads."""
        return neurons(
            x,
            self.weight,
            self.bias,
            self.to_soma,
            self.to_dendrite,
            self.activation,
            self.site.geometry,
        )


class FusedNeurons(Neurons):
    """Linear somas with their dendrites, their weights side by side for a GPU's *fused* kernel.

    Arguments are those of `Neurons`; at least one dendrite reaches the soma.
    """

    @staticmethod
    def lay(stacked: Tensor, geometry: Geometry) -> Tensor:
        """Return the one weight that is kept of stacked ones."""
        return frozen.lay(stacked)

    def soma(self, role: str) -> Tensor | None:
        """Return the soma's own "weight" or "bias", shaped as the site's op has it."""
        if role == "bias":
            return super().soma(role)
        rows = frozen.take_apart(self.weight, -2, 1, self.site.neurons)[0]
        return rows.mT if self.site.input_first else rows

    def evaluate(self, x: Tensor) -> Tensor:
        """Return the neurons' output, from what the soma's op itself reads."""
        return frozen.frozen_neurons(
            x, self.weight, self.bias, self.to_soma, self.to_dendrite, self.activation
        )


class PackedDendrites(_Packed):
    """The dendrites of a site whose soma stays an op of its own.

    Args:
        dendrites: at least one of them reaches the soma; perhaps on some of its neurons only.
    """

    def __init__(self, dendrites: Dendrites) -> None:
        site = dendrites.site
        super().__init__(site, dendrites.activation, stacks_of(site, dendrites.weight, dendrites))

    def forward(self, soma: Tensor, x: Tensor) -> Tensor:
        """Return the neurons' output.

        Args:
            soma: what the soma gave, and its norm if there is one.
            x: what the soma read.
        """
        part, x = self.take(soma, x)
        out = joined(
            part,
            pad(x, self.site),
            self.weight,
            self.bias,
            self.to_soma,
            self.to_dendrite,
            self.activation,
            fit_form(self.site, part, x),
        )
        return self.put(soma, out)


def neurons_of(
    site: Site,
    weight: Tensor,
    bias: Tensor | None,
    dendrites: Dendrites | None,
    ranks: tuple[int, ...] = (),
    portable: bool = True,
) -> Neurons:
    """Return the neurons of a site, as the device that their weights lie on computes them best.

    Args:
        site: and the rest up to `ranks`: as of `Neurons`.
        weight: likewise.
        bias: likewise.
        dendrites: likewise.
        ranks: likewise.
        portable: whether to ask for nothing that another device would not have.
    """
    kind: type[Neurons] = Neurons
    if not portable and dendrites is not None and site.geometry.spatial == 0:
        form = (1 + len(reaching(dendrites)), *site.op_shape)
        if frozen.wins(weight.detach().new_empty(()).expand(form)):
            kind = FusedNeurons
    return kind(site, weight, bias, dendrites, ranks)


def stacks_of(site: Site, weight: Tensor, dendrites: Dendrites | None) -> Stacks:
    """Return the dendrites that reach their soma, directly or through later ones.

    Args:
        site: whose dendrites these are.
        weight: for dtype and device.
        dendrites: may be None.
    """
    if dendrites is None:
        like = weight.detach()
        none = like.new_zeros(0, site.neurons)
        return Stacks(like.new_zeros(0, *site.op_shape), None, none, none.new_zeros(0, *none.shape))
    links, cascade = dendrites.to_soma.detach(), dendrites.to_dendrite.detach()
    kept = reaching(dendrites)
    bias = dendrites.bias
    return Stacks(
        site.op_weight(dendrites.weight.detach()[kept]),
        None if bias is None else bias.detach()[kept],
        links[kept],
        cascade[kept][:, kept],
    )


def reaching(dendrites: Dendrites) -> list[int]:
    """Return the dendrites that have a link to the soma, or to a later one that reaches it."""
    to_soma, to_dendrite = dendrites.to_soma.detach(), dendrites.to_dendrite.detach()
    if to_soma.is_meta:
        return list(range(dendrites.count))
    kept: list[int] = []
    for d in reversed(range(dendrites.count)):
        if to_soma[d].any() or any(to_dendrite[later, d].any() for later in kept):
            kept.insert(0, d)
    return kept


def _stacked_biases(
    own: Tensor | None, grown: Tensor | None, dendrites: int, neurons: int
) -> Tensor | None:
    """Return (1 + D, N), zeros for whatever has no bias, or None where nothing has one."""
    given = own if grown is None else grown
    if given is None:
        return None
    rows = (
        given.new_zeros(1, neurons) if own is None else own,
        given.new_zeros(dendrites, neurons) if grown is None else grown,
    )
    return torch.cat(rows)


def _frozen(tensor: Tensor) -> nn.Parameter:
    # Of its own, so that what is packed does not follow the model that is still being trained.
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
