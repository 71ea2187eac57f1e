"""What stands at the entrance and the exit of an exported graph.

An export knows its inputs as a flat list of tensors. It holds for the structure and the dtypes of
the example, for the sizes that forward did not ask about, and where it creates tensors, for one
device. The entrance takes the arguments of a call apart and refuses others than those; the exit
gives what forward returned its structure back.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from pbfx.capture.sizes import Check, compiled, wrong_size
from pbfx.capture.structures import (
    Branch,
    Constant,
    Leaf,
    Structure,
    follow,
    put_together,
    take_apart,
)
from pbfx.errors import CaptureError, ConfigError, nearest
from pbfx.wording import counted

# What fx can write into the head of a function.
_LITERALS = (type(None), bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Entrance:
    """The parameters of a forward, and what the example gave for them.

    Attributes:
        parameters: of the forward, in order.
        structures: of what each was given.
        leaves: the tensors of the example.
        names: what to call each of them in an error.
    """

    parameters: tuple[inspect.Parameter, ...]
    structures: tuple[Structure, ...]
    leaves: tuple[Any, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Entrance:
        """Return the entrance for calls like `module(*inputs)`, or `module(**inputs)`."""
        signature = inspect.signature(module.forward)
        try:
            given = (
                signature.bind(**inputs) if isinstance(inputs, Mapping) else signature.bind(*inputs)
            )
        except TypeError as error:
            raise ConfigError(
                f"pbfx.transform: example_inputs do not fit {type(module).__name__}.forward"
                f"{signature}: {error}"
            ) from error
        given.apply_defaults()
        leaves: list[Any] = []
        structures = tuple(take_apart(v, leaves, k) for k, v in given.arguments.items())
        names = [""] * len(leaves)
        for name, structure in zip(given.arguments, structures, strict=True):
            _name(structure, name, names)
        parameters = tuple(signature.parameters.values())
        return cls(parameters, structures, tuple(leaves), tuple(names))

    def arguments(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments for forward, with `leaves` for the tensors."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter, structure in zip(self.parameters, self.structures, strict=True):
            value = put_together(structure, leaves)
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += value
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs |= value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        return args, kwargs

    def shapes(self, dynamic: Any) -> list[Any]:
        """Return for each leaf which of its sizes may change, as torch.export wants it.

        Args:
            dynamic: `dynamic_shapes` of torch.export, by position or name; None for all sizes.
        """
        if dynamic is None:
            from torch.export import Dim

            # A size of one is there to be broadcast, unless it is that of the batch.
            batch_of_one = all(leaf.shape[:1] == (1,) for leaf in self.leaves if leaf.dim())
            return [
                {
                    dim: Dim.AUTO
                    for dim, size in enumerate(leaf.shape)
                    if size != 1 or (dim == 0 and batch_of_one)
                }
                for leaf in self.leaves
            ]
        found: list[Any] = [None] * len(self.leaves)
        known = [parameter.name for parameter in self.parameters]
        if not isinstance(dynamic, Mapping):
            dynamic = dict(zip(known, dynamic, strict=False))
        inside = {
            key
            for parameter, structure in zip(self.parameters, self.structures, strict=True)
            if parameter.kind is parameter.VAR_KEYWORD and isinstance(structure, Branch)
            for key in structure.keys
        }
        for name in dynamic.keys() - set(known) - inside:
            raise ConfigError(
                f"pbfx.transform: dynamic_shapes names no input {name!r}; "
                f"{nearest(name, [*known, *inside])}"
            )
        for parameter, structure in zip(self.parameters, self.structures, strict=True):
            collected = parameter.kind is parameter.VAR_KEYWORD and parameter.name not in dynamic
            spec = dynamic if collected else dynamic.get(parameter.name)
            _spread(structure, spec, found, parameter.name)
        return found

    def build(
        self, graph: fx.Graph, checks: Sequence[Check], parameter: str, held: Held
    ) -> list[fx.Node]:
        """Write the entrance into `graph`, and return the nodes that stand for the leaves.

        Args:
            graph: an empty one.
            checks: what has to hold for the sizes.
            parameter: path of one that stands for all: it tells when the model was moved or cast.
            held: what else has to hold.
        """
        inputs = []
        for given in self.parameters:
            star = {given.VAR_POSITIONAL: "*", given.VAR_KEYWORD: "**"}.get(given.kind, "")
            needed = given.default is given.empty and not any(node.args for node in inputs)
            if star or needed:
                inputs.append(graph.placeholder(f"{star}{given.name}"))
            else:
                # For what cannot be written, and for what must be given although it follows on
                # something optional, None stands, and the entrance knows better.
                literal = isinstance(given.default, _LITERALS)
                default = given.default if literal else None
                inputs.append(graph.placeholder(given.name, default_value=default))
        state = graph.get_attr(parameter)
        entered = graph.call_function(self._enter(checks, held), (*inputs, state))
        return [
            graph.call_function(operator.getitem, (entered, index))
            for index in range(len(self.leaves))
        ]

    def _enter(self, checks: Sequence[Check], held: Held) -> Callable[..., list[Tensor]]:
        parameters, structures, names = self.parameters, self.structures, self.names
        before = [(t.dtype, t.device) for t in (*self.leaves, held.parameter)]
        dtypes, devices = [dtype for dtype, _ in before], [device for _, device in before]
        ranks = [leaf.dim() for leaf in self.leaves]
        holds, fixed_device = compiled([check.code for check in checks]), held.device
        named = [parameter.name for parameter in parameters]
        # By the parameter's place: a default that could not be written into the graph.
        unwritten = {
            index: parameter.default
            for index, parameter in enumerate(parameters)
            if parameter.default is not parameter.empty
            and not isinstance(parameter.default, _LITERALS)
        }

        def enter(*values: Any) -> list[Tensor]:
            leaves: list[Tensor] = []
            for index, (name, structure) in enumerate(zip(named, structures, strict=True)):
                value = values[index]
                if value is None and index in unwritten:
                    value = unwritten[index]
                follow(structure, value, leaves, name)
            state = [*leaves, values[-1]]
            if [t.dtype for t in state] != dtypes:
                raise _changed("dtype", [t.dtype for t in state], dtypes, names, "cast")
            if fixed_device and [t.device for t in state] != devices:
                raise _changed("device", [t.device for t in state], devices, names, "move")
            shapes = [leaf.shape for leaf in leaves]
            if [len(shape) for shape in shapes] != ranks or not holds(shapes):
                raise wrong_size(checks, names, shapes, ranks)
            return leaves

        return enter


@dataclasses.dataclass(frozen=True)
class Held:
    """What an exported graph holds on to, beside sizes.

    Attributes:
        parameter: one of the model's, as it was; its dtype has to stay, and so have the inputs'.
        device: whether the device has to stay too, because the graph names it.
    """

    parameter: Tensor
    device: bool


def leave(graph: fx.Graph, structure: Structure, values: Sequence[Any]) -> None:
    """End `graph`: it returns a value of `structure`, whose tensors are `values`."""
    if _is_plain(structure):
        graph.output(put_together(structure, values))
        return

    def rebuild(*leaves: Any) -> Any:
        return put_together(structure, leaves)

    graph.output(graph.call_function(rebuild, tuple(values)))


def _changed(
    what: str, now: Sequence[Any], then: Sequence[Any], names: Sequence[str], verb: str
) -> CaptureError:
    named = zip([*names, "the model's parameters"], now, then, strict=True)
    changed = [f"{name} ({old}, now {new})" for name, new, old in named if new != old]
    return CaptureError(
        f"the exported graph holds for one {what} of {', '.join(changed)}; {verb} the model and "
        "its example_inputs first, then call pbfx.transform"
    )


def _is_plain(structure: Structure) -> bool:
    """Return whether fx itself can write `structure` into a graph."""
    if isinstance(structure, Leaf):
        return True
    if isinstance(structure, Constant):
        return isinstance(structure.value, _LITERALS)
    written = structure.kind in (tuple, list) or (
        structure.kind is dict and all(isinstance(key, str) for key in structure.keys)
    )
    return structure.spec is None and written and all(map(_is_plain, structure.parts))


def _name(structure: Structure, name: str, names: list[str]) -> None:
    if isinstance(structure, Leaf):
        names[structure.index] = name
    elif isinstance(structure, Branch):
        for key, part in zip(structure.keys, structure.parts, strict=True):
            _name(part, f"{name}[{key!r}]", names)


def _spread(structure: Structure, spec: Any, found: list[Any], name: str) -> None:
    """Hand `spec`, which has the structure of an input, to the leaves."""
    if isinstance(structure, Leaf):
        found[structure.index] = spec
    elif isinstance(structure, Branch) and spec is not None:
        by_name = isinstance(spec, Mapping)
        if not by_name and len(spec) != len(structure.keys):
            raise ConfigError(
                f"pbfx.transform: dynamic_shapes for {name} has "
                f"{counted(len(spec), 'entry', 'entries')}, the input "
                f"{len(structure.keys)}"
            )
        for index, (key, part) in enumerate(zip(structure.keys, structure.parts, strict=True)):
            inner = spec.get(key) if by_name else spec[index]
            _spread(part, inner, found, f"{name}[{key!r}]")
