"""Apply the user's patterns to the sites of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from pbfx.config import Config
from pbfx.errors import ConfigError, nearest
from pbfx.paths import join
from pbfx.sites.adapters import REASON
from pbfx.sites.site import Site, Skipped

Choice = tuple[tuple[Site, ...], tuple[Skipped, ...]]


def choose_sites(
    parts: Mapping[str, tuple[nn.Module, Sequence[Site]]],
    config: Config,
    folded: Collection[str] = (),
) -> dict[str, Choice]:
    """Choose among the sites of all parts of a model, by their full paths.

    Args:
        parts: for the path of each part, the module that its graph runs over, and its sites.
        config: `include`, `exclude` and `filter_fn`, which is asked last and gets the module that
            owns the weight, with the site's full path.
        folded: paths of adapters' weights, which have to be named by `include` to carry dendrites.

    Returns:
        For the path of each part: the chosen sites, and the others with the reason.

    Raises:
        ConfigError: if a pattern matches no site of any part, or nothing is left to grow on.
    """
    names = [join(path, site.name) for path, (_, sites) in parts.items() for site in sites]
    _check_patterns(config, names)
    chosen: dict[str, Choice] = {}
    for path, (root, sites) in parts.items():
        kept, unwanted = [], []
        for site in sites:
            full = join(path, site.name)
            reason = _unwanted(root, site, full, config)
            if config.include == ("*",) and f"{full}.".startswith(tuple(f"{p}." for p in folded)):
                reason = REASON
            if reason is None:
                kept.append(site)
            else:
                unwanted.append(Skipped(site.name, site.op, reason))
        chosen[path] = tuple(kept), tuple(unwanted)
    if names and not any(kept for kept, _ in chosen.values()):
        reasons = "; ".join(
            f"{join(path, s.name)!r} ({s.op}): {s.reason}"
            for path, (_, unwanted) in chosen.items()
            for s in unwanted
        )
        raise ConfigError(
            f"pbfx.Config: include={config.include!r}, exclude={config.exclude!r} and filter_fn "
            f"leave no site to grow on. {reasons}"
        )
    return chosen


def _unwanted(root: nn.Module, site: Site, path: str, config: Config) -> str | None:
    if not any(fnmatch.fnmatchcase(path, glob) for glob in config.include):
        return "no pattern of include matches it"
    for glob in config.exclude:
        if fnmatch.fnmatchcase(path, glob):
            return f"excluded by {glob!r}"
    owner = root.get_submodule(site.weight.rpartition(".")[0])
    if config.filter_fn is not None and not config.filter_fn(owner, path):
        return "filter_fn said no"
    return None


def _check_patterns(config: Config, names: list[str]) -> None:
    for setting in ("include", "exclude"):
        for glob in getattr(config, setting):
            if names and not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise ConfigError(
                    f"pbfx.Config: {setting}={glob!r} matches no eligible op; "
                    f"{nearest(glob, names)}"
                )
