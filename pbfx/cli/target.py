"""Find what `package.module:callable` names, and build the model."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pbfx import PbfxError
from pbfx.errors import nearest

if TYPE_CHECKING:
    from torch import nn


class TargetError(PbfxError):
    """What the command line names is no model, or its code fails."""


def build(target: str) -> nn.Module:
    """Return the model that `target` names, built without arguments.

    The current folder is searched first. What the model's code prints goes to stderr, because
    stdout may be read by a program.

    Args:
        target: `package.module:name`; the name may have dots (`Net.small`), and stand for a class
            or function that returns a model, or for a model.

    Raises:
        TargetError: if there is no such thing, it needs arguments, its code fails, or it gives no
            module.
    """
    from torch import nn

    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise TargetError(f"the model is named MODULE:CALLABLE, as in train:Net; got {target!r}")
    if not all(name.isidentifier() for name in module_name.split(".")):
        raise TargetError(f"{module_name!r} is no name of a module, as Python imports it")
    with contextlib.redirect_stdout(sys.stderr):
        found = _attribute(_import(module_name), module_name, attribute)
        if isinstance(found, nn.Module):
            return found
        model = _call(found, target)
    if not isinstance(model, nn.Module):
        raise TargetError(f"{target} gives no nn.Module; got {_kind(model)}")
    return model


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{name}.".startswith(f"{missing}.") and missing:
            raise TargetError(f"there is no module {missing!r}; {_near(missing)}") from error
        raise TargetError(f"importing {name} fails: {_cause(error)}") from error
    # The user's module may raise anything, and a script without a guard exits.
    except (Exception, SystemExit) as error:
        raise TargetError(f"importing {name} fails: {_cause(error)}") from error


def _near(name: str) -> str:
    """Return a hint at modules beside the missing one."""
    parent, _, own = name.rpartition(".")
    if parent:
        package = sys.modules[parent]
        if not hasattr(package, "__path__"):
            return f"{parent!r} is a module, not a package"
        return nearest(own, {module.name for module in pkgutil.iter_modules(package.__path__)})
    here = {module.name for module in pkgutil.iter_modules([os.getcwd()])}
    if not here:
        return f"the current folder ({os.getcwd()}) holds none"
    return f"in the current folder: {nearest(own, here)}"


def _attribute(module: ModuleType, module_name: str, path: str) -> Any:
    found: Any = module
    for number, name in enumerate(path.split(".")):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            owner = ".".join([module_name, *path.split(".")[:number]])
            choices = {n for n in dir(found) if not n.startswith("_") and _may_build(found, n)}
            hint = nearest(name, choices) if choices else "it has nothing that can be called"
            raise TargetError(f"{owner} has no {name!r}; {hint}") from error
    return found


def _may_build(owner: object, name: str) -> bool:
    """Return whether an attribute can be called and is the owner's own, not an import of it."""
    value = getattr(owner, name, None)
    own = getattr(value, "__module__", None)
    home = owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", "")
    package = home.partition(".")[0]
    return callable(value) and (own is None or own.partition(".")[0] == package)


def _call(found: Any, target: str) -> Any:
    if not callable(found):
        raise TargetError(f"{target} cannot be called; it is {_kind(found)}")
    try:
        parameters = inspect.signature(found).parameters.values()
    # Some builtins have no signature; calling them tells.
    except (TypeError, ValueError):
        parameters = ()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if needed:
        raise TargetError(
            f"{target} needs arguments ({', '.join(needed)}); name a function without any that "
            "returns the model"
        )
    try:
        return found()
    # The user's function may raise anything.
    except (Exception, SystemExit) as error:
        raise TargetError(f"building {target} fails: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return an error in one line, with the place in the user's code where it arose."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":. ")
    if isinstance(error, SyntaxError):
        return text
    skipped = (__file__, importlib.__file__, "<frozen ")
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith(skipped)]
    # What a user wrote rather than the library that it called.
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts]
    for frame in reversed(own or frames):
        return f"{text} ({os.path.relpath(frame.filename)}, line {frame.lineno})"
    return text


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of class {type(value).__name__}"
