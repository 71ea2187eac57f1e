"""Module paths: dotted names, the empty one for the root.

A restructure asks for thousands of modules: what is here does what methods of `nn.Module` do, in a
fraction of their time.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def join(prefix: str, name: str) -> str:
    """Return the path of `name` inside the module at `prefix`; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return what `root.get_submodule(path)` does.

    Raises:
        AttributeError: if there is no module at `path`.
    """
    module = root
    for name in path.split(".") if path else ():
        below = module._modules.get(name)
        if below is None:
            return root.get_submodule(path)
        module = below
    return module


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """Return what `module_at` does, None if there is no module at `path`."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        if module is None:
            break
        module = module._modules.get(name)
    return module


def modules_in(root: nn.Module) -> dict[str, nn.Module]:
    """Return what `dict(root.named_modules())` is."""
    found: dict[str, nn.Module] = {"": root}
    seen = {id(root)}

    def walk(prefix: str, children: dict[str, nn.Module | None]) -> None:
        for name, module in children.items():
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            path = prefix + name
            found[path] = module
            if module._modules:
                walk(f"{path}.", module._modules)

    walk("", root._modules)
    return found


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return what `dict(root.named_parameters())` is, given what `modules_in(root)` is."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}" if path else name] = parameter
    return found
