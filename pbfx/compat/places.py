"""Which layers a script wants to grow: its lists of modules as a filter of `pbfx.Config`."""

from __future__ import annotations

import dataclasses

from torch import nn

from pbfx.compat.store import Settings

_TRACK = ("track", "skip")


@dataclasses.dataclass(frozen=True)
class ChosenModules:
    """Let grow what is owned by one of these modules.

    Names and not the modules, so that a perforated model can still be pickled.
    """

    paths: frozenset[str]

    def __call__(self, module: nn.Module, path: str) -> bool:
        """Return whether the site at `path`, whose weight `module` owns, may grow."""
        while path not in self.paths and path:
            path = path.rpartition(".")[0]
        return path in self.paths


def chosen_modules(model: nn.Module, settings: Settings) -> ChosenModules:
    """Return the filter that the lists of modules amount to for `model`.

    The outermost module that a list names decides for all that is inside: a tracked block keeps its
    layers plain, a perforated one lets them grow. A path goes before a class.
    """
    decided: dict[str, bool] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = path.rpartition(".")[0]
        if path and parent in decided:
            decided[path] = decided[parent]
            continue
        verdict = _verdict(path, module, settings)
        if verdict is not None:
            decided[path] = verdict
    return ChosenModules(frozenset(path for path, grows in decided.items() if grows))


def _verdict(path: str, module: nn.Module, settings: Settings) -> bool | None:
    # Paths are written with a leading dot there; a root has none that could be listed.
    ids = {path, f".{path}"}
    if any(ids & set(settings.value(f"module_ids_to_{verb}")) for verb in _TRACK):
        return False
    if ids & set(settings.value("module_ids_to_perforate")):
        return True
    if any(_is_listed(module, settings, verb) for verb in _TRACK):
        return False
    return True if _is_listed(module, settings, "perforate") else None


def _is_listed(module: nn.Module, settings: Settings, verb: str) -> bool:
    own = type(module)
    names = settings.value(f"module_names_to_{verb}")
    return own.__name__ in names or own in settings.value(f"modules_to_{verb}")


def replace_modules(model: nn.Module, settings: Settings) -> nn.Module:
    """Put replacements in the place of the modules that the script lists, and return the model."""
    pairs = dict(
        zip(
            settings.value("modules_to_replace"),
            settings.value("replacement_modules"),
            strict=False,
        )
    )
    if type(model) in pairs:
        return pairs[type(model)](model)
    for name, child in list(model.named_children()):
        new = replace_modules(child, settings) if pairs else child
        if new is not child:
            setattr(model, name, new)
    return model
