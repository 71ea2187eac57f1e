"""What users can import, with its signatures, changes only on purpose.

`public_api.txt` is the record. A diff in it belongs in CHANGELOG.md too.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import os
import re
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import pbfx

SNAPSHOT = Path(__file__).with_name("public_api.txt")
UPDATE = "PBFX_UPDATE_SNAPSHOTS"
PACKAGES = ["pbfx", "pbfx_kernels"]


def signature(value: object) -> str:
    """Return the signature as text that is the same in every process and Python version."""
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return "(...)"
    # With `from __future__ import annotations`, annotations are strings and print with quotes.
    return without_address(re.sub(r"(: |-> )'([^']*)'", r"\1\2", text))


def without_address(text: str) -> str:
    """Return `text` without the addresses that default values such as functions print."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def describe_class(name: str, cls: type) -> Iterator[str]:
    """Yield a class, its members or fields, and the public methods and properties it defines."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if issubclass(cls, enum.Enum):
        yield from (f"    {name}.{member.name} = {member.value!r}" for member in cls)
        return
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            kind = field.type
            text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
            line = f"    {name}.{field.name}: {text}"
            if field.default is not dataclasses.MISSING:
                line += f" = {without_address(repr(field.default))}"
            elif field.default_factory is not dataclasses.MISSING:
                line += f" = {without_address(repr(field.default_factory))}()"
            yield line
    elif "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
        yield f"    {name}{signature(cls)}"
    for key, value in sorted(vars(cls).items()):
        if key.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"    {name}.{key} (property)"
        elif isinstance(value, (classmethod, staticmethod, types.FunctionType)):
            yield f"    {name}.{key}{signature(getattr(cls, key))}"


def describe(name: str, value: object) -> Iterator[str]:
    if inspect.isclass(value):
        yield from describe_class(name, value)
    elif inspect.ismodule(value):
        yield f"module {name}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        # A constant is API; its value (a version, a table of blocks) is not.
        yield f"{name}: {type(value).__name__}"


def listing() -> str:
    """Return the public API as lines, sorted by name within each package."""
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            lines += describe(f"{package}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_exist_once(package: str):
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing, f"{package}.__all__ names what {package} does not have: {missing}"
    assert len(module.__all__) == len(set(module.__all__))


def test_public_api_is_the_recorded_one():
    now = listing()
    if os.environ.get(UPDATE):
        SNAPSHOT.write_text(now, encoding="utf-8")
        pytest.skip(f"wrote {SNAPSHOT.name}")
    recorded = SNAPSHOT.read_text(encoding="utf-8") if SNAPSHOT.exists() else ""
    diff = "\n".join(
        difflib.unified_diff(
            recorded.splitlines(), now.splitlines(), "recorded", "now", lineterm="", n=1
        )
    )
    assert not diff, (
        f"the public API differs from tests/{SNAPSHOT.name}. If that is intended, run\n"
        f"    {UPDATE}=1 .venv/bin/pytest tests/{Path(__file__).name}\n"
        f"commit the file, and add a line to CHANGELOG.md.\n{diff}"
    )


def test_version_is_that_of_the_distribution():
    assert pbfx.__version__ == metadata.version("pbfx")
