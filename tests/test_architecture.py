"""Imports point down the list of rooms only, and nothing in a library talks, prompts or exits."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PBFX = ROOT / "pbfx"
KERNELS = ROOT / "kernels" / "pbfx_kernels"

# Lowest first: a room may import rooms of its own line and of the lines above it. A room is a file
# or a folder directly under pbfx/.
LAYERS: list[tuple[str, str]] = [
    (
        "errors config settings figures phase files encoding paths copies artefacts machine "
        "wording",
        "say what is wrong, wanted, stored; know no graph",
    ),
    (
        "topology cells attention sites capture structure kept plain_graph",
        "read the model; rewrite nothing",
    ),
    (
        "dendrites candidates spread sited neurons draws reserve",
        "own the parameters of one site; know no graph around it",
    ),
    ("learning", "train dendrites; know no pass"),
    (
        "passes pipeline derived perforation kinds followers perforated absorbed compiled lowered",
        "rewrite graphs; `perforated` is what they rewrite",
    ),
    (
        "transform assembly restructure by_hand parts snapshot undo optimizers checkpoint explain "
        "lower",
        "the verbs, each made of passes",
    ),
    (
        "policy history waypoint budget rates capacity belonging run run_files deciding listening "
        "measuring acting ranks tracker",
        "when to restructure, and the call that does it",
    ),
    ("backend", "torch.compile: lowers what the verbs made"),
    ("compat integrations cli __main__ demo", "outermost: nothing below imports them"),
]

LEVEL = {room: level for level, (rooms, _) in enumerate(LAYERS) for room in rooms.split()}
OUTERMOST = frozenset(LAYERS[-1][0].split())
# Rooms that run a terminal session, and so may print and exit.
TERMINAL = frozenset({"cli", "__main__", "demo"})
# What pbfx/policy/ may import beside the standard library: these import nothing else themselves.
PURE = frozenset({"pbfx.errors", "pbfx.phase", "pbfx.settings", "pbfx.figures", "pbfx.wording"})
# Calls that take the terminal or the process away from the program that imported us.
FORBIDDEN_CALLS = frozenset(
    ["print", "input", "breakpoint", "pdb.set_trace", "exit", "quit", "sys.exit", "os._exit"]
)


def modules(package: Path) -> dict[str, Path]:
    """Map the dotted name of every module under `package` to its file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(
    name: str, path: Path, known: dict[str, Path], within: ast.AST | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (imported module, line) for the file `path`, or for one statement `within` it.

    `from a import b` yields `a.b` where that is a module of ours, else `a`. Imports under
    `TYPE_CHECKING` and inside functions count: knowing a type is knowing the room it lives in.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(within or parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in known else base), node.lineno


def import_graph() -> nx.DiGraph:
    """Return the modules of pbfx, with an edge from each importer to what it imports."""
    known = modules(PBFX)
    graph = nx.DiGraph()
    for name, path in known.items():
        graph.add_node(name)
        for target, line in imports(name, path, known):
            if target.partition(".")[0] == "pbfx":
                graph.add_edge(name, target, where=f"{path.relative_to(ROOT)}:{line}")
    return graph


def room(module: str) -> str:
    """Return the file or folder under pbfx/ that `module` lives in; "" for pbfx itself."""
    return module.split(".")[1] if "." in module else ""


def third_party(path: Path, name: str, known: dict[str, Path]) -> dict[str, int]:
    """Return the packages outside the standard library that a module imports, with a line."""
    roots = {target.partition(".")[0]: line for target, line in imports(name, path, known)}
    return {root: line for root, line in roots.items() if root not in sys.stdlib_module_names}


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) for each call in `tree`, and for each `raise SystemExit`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) == "SystemExit":
                yield "sys.exit", node.lineno


def test_every_module_has_a_layer():
    unlisted = sorted({room(name) for name in modules(PBFX)} - LEVEL.keys() - {""})
    assert not unlisted, (
        f"no layer for {', '.join(f'pbfx/{name}' for name in unlisted)}: add each to the line of "
        f"LAYERS in {Path(__file__).name} that it belongs to (the lowest that holds all it imports)"
    )


def test_imports_point_down():
    wrong = []
    for source, target, where in import_graph().edges(data="where"):
        above, below = room(source), room(target)
        if above == "":
            if below in OUTERMOST:
                wrong.append(f"{where}: pbfx imports pbfx.{below}, which is outermost")
        elif below == "":
            if above not in OUTERMOST:
                wrong.append(f"{where}: {source} imports pbfx itself, which imports every room")
        elif LEVEL.get(below, -1) > LEVEL.get(above, len(LAYERS)):
            wrong.append(f"{where}: {source} imports {target}, {LAYERS[LEVEL[below]][1]!r}")
    assert not wrong, "imports must point down the list in LAYERS:\n" + "\n".join(wrong)


@pytest.mark.parametrize("grain", ["module", "room"])
def test_no_import_cycles(grain: str):
    graph = import_graph()
    graph.remove_nodes_from([node for node in graph if room(node) == ""])
    if grain == "room":
        graph = nx.DiGraph((room(a), room(b)) for a, b in graph.edges if room(a) != room(b))
    cycles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not cycles, f"these {grain}s import each other in a circle: {cycles}"


def test_policy_is_pure():
    known = modules(PBFX)
    files = {name: path for name, path in known.items() if room(name) == "policy"}
    assert files, "pbfx/policy/ is gone: check what took its place"
    impure = sorted(
        f"{path.relative_to(ROOT)}:{line}: {target}"
        for name, path in files.items()
        for target, line in imports(name, path, known)
        if target not in PURE
        and room(target) != "policy"
        and target.partition(".")[0] not in sys.stdlib_module_names
    )
    assert not impure, (
        f"a policy is a function of the score history; beside the standard library it imports "
        f"{' and '.join(sorted(PURE))} only:\n" + "\n".join(impure)
    )


def test_kernels_stand_alone():
    known = modules(KERNELS)
    strays = [
        f"{path.relative_to(ROOT)}:{line}: {root}"
        for name, path in known.items()
        for root, line in third_party(path, name, known).items()
        if root not in {"torch", "triton", "pbfx_kernels"}
    ]
    assert known, f"no modules under {KERNELS}"
    assert not strays, "pbfx_kernels imports torch and triton only:\n" + "\n".join(strays)


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "a top-level module named `kernels` breaks `import transformers`; delete __init__.py"
    )


def test_library_imports_what_it_declares():
    """Every package that a room below the outermost imports is in pyproject.toml.

    Optional ones must wait inside a function, so that `import pbfx` works without them.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]}
    optional = {re.match(r"[\w.-]+", line)[0] for line in project["optional-dependencies"]["plots"]}
    known = modules(PBFX)
    strays = []
    for name, path in known.items():
        if room(name) in OUTERMOST:
            continue
        eager = {
            target.partition(".")[0]
            for statement in parse(path).body
            if isinstance(statement, (ast.Import, ast.ImportFrom))
            for target, _ in imports(name, path, known, within=statement)
        }
        for root, line in third_party(path, name, known).items():
            if root in required | {"pbfx", "pbfx_kernels"}:
                continue
            if root in optional and root not in eager:
                continue
            strays.append(f"{path.relative_to(ROOT)}:{line}: {root}")
    assert not strays, "not a dependency in pyproject.toml, or not optional:\n" + "\n".join(strays)


def test_library_never_takes_the_terminal():
    files = [*modules(KERNELS).values()]
    files += [path for name, path in modules(PBFX).items() if room(name) not in TERMINAL]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {call}"
        for path in files
        for call, line in calls(parse(path))
        if call in FORBIDDEN_CALLS
    ]
    assert not wrong, "log through `logging` and raise a PbfxError instead:\n" + "\n".join(wrong)
