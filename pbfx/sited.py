"""What belongs to a site and may be on some of its channels only: its dendrites, its candidates.

    part = output[channels]      ... work on `part` ...      output[channels] = part

The numbers of the channels are part of the structure, as D is, and no buffer: averages over buffers
(`AveragedModel(use_buffers=True)`) round whole numbers, and half precision has none above 2048. The
tensors here are made from the site's own numbers, anew after every move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbfx.sites import Site
from pbfx.structure import channels_of
from pbfx_kernels import Geometry


class Sited(nn.Module):
    """A module at a site.

    Args:
        site: where; if it is a subset, the module works on that part of the op's output.
        device: where the module's tensors are.
    """

    # Whether the module's state dict says which channels these are.
    lists_channels = False
    site: Site
    weight: nn.Parameter
    channels: Tensor | None
    inputs: Tensor | None

    def __init__(self, site: Site, device: torch.device) -> None:
        super().__init__()
        vars(self).update(site=site)
        self._place(device)

    def _place(self, device: torch.device) -> None:
        subset = self.site.subset
        channels, inputs = (None, None) if subset is None else (subset.channels, subset.inputs)
        vars(self).update(
            channels=None if channels is None else torch.tensor(channels, device=device),
            inputs=None if inputs is None else torch.tensor(inputs, device=device),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place(self.weight.device)
        return self

    def take(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of the op's output, and of its input, that the site is about.

        Args:
            output: (..., N) or (B, N, *space) of the whole op.
            x: what the op read.

        Returns:
            (..., n) or (B, n, *space), and `x` or the channels of it that a group reads.
        """
        axis = self.site.geometry.channel_axis
        if self.channels is not None:
            # A replica of DataParallel has parameters and buffers of its own, and nothing else.
            output = output.index_select(axis, self.channels.to(output.device))
        if self.inputs is not None:
            x = x.index_select(axis, self.inputs.to(x.device))
        return output, x

    def put(self, output: Tensor, part: Tensor) -> Tensor:
        """Return `output` with `part` in the place of what `take` took."""
        if self.channels is None:
            return part
        axis, channels = self.site.geometry.channel_axis, self.channels.to(output.device)
        if in_torch_func():
            # `part` may have a batch axis that `output` has not, as where links are mapped over.
            return output.index_copy(axis, channels, part)
        # A clone keeps the layout, `index_copy` does not; what follows rounds by its layout.
        return output.clone().index_copy_(axis, channels, part)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lists_channels and self.site.channels is not None:
            # On the CPU, because whoever loads it has to read the numbers.
            destination[f"{prefix}channels"] = torch.tensor(self.site.channels, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual; the channels themselves are structure, which the owner has taken on."""
        key, ours = f"{prefix}channels", self.site.channels
        if self.lists_channels and key in state_dict:
            theirs = channels_of(state_dict[key], key)
            if ours is None:
                error_msgs.append(f"{key} lists channels, and these dendrites are on all of them")
            elif theirs != ours:
                error_msgs.append(f"{key} is {list(theirs)}, but these dendrites' is {list(ours)}")
            state_dict = {name: value for name, value in state_dict.items() if name != key}
        elif self.lists_channels and ours is not None and strict:
            missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def in_torch_func() -> bool:
    """Return whether torch.func (grad, vmap, jvp, ...) is transforming what runs now."""
    # Dynamo does not know the question, and compiles torch.func's transforms by itself.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def pad(x: Tensor, site: Site) -> Tensor:
    """Apply the padding that the op itself cannot, as the soma's own module does."""
    return x if site.padding is None else F.pad(x, site.padding.widths, mode=site.padding.mode)


def fit_form(site: Site, soma: Tensor, x: Tensor) -> Geometry:
    """Return the form of this call: a transposed convolution may be asked for another size."""
    form = site.geometry
    if not form.transposed:
        return form
    bare = dataclasses.replace(form, output_padding=(0,) * form.spatial)
    least = bare.output_shape(x.shape, site.op_shape)[-form.spatial :]
    extents = soma.shape[-form.spatial :]
    added = tuple(size - base for size, base in zip(extents, least, strict=True))
    return form if added == form.output_padding else dataclasses.replace(form, output_padding=added)


def per_dendrite(fn: Callable[[Tensor], Tensor], *stacks: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what applies `fn` to stacked weights as if each were a soma's.

    A memory format is for a convolution's weight; the stack has one axis more than the format has.
    """
    stacked = {id(t) for s in stacks for t in (s, s.grad) if t is not None}

    def apply(tensor: Tensor) -> Tensor:
        if id(tensor) not in stacked:
            return fn(tensor)
        return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

    return apply


def keep_out_of_fast_paths(module: nn.Module) -> None:
    """Let torch's fused fast paths stand aside for `module`.

    nn.TransformerEncoderLayer and nn.MultiheadAttention in eval read the weights around the modules
    inside, which would leave dendrites out without a word. They stand aside where one has a hook.
    """
    module.register_forward_pre_hook(_do_nothing)


def _do_nothing(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Be a hook; that there is one is what counts."""
