"""`pbfx explain`: a model from the shell, and one readable sentence where there is none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pbfx
from pbfx.cli import main

ROOT = Path(__file__).parents[2]

NETS = '''
"""Models for the tests of the command."""
import functools
import torch
from torch import nn
import pbfx

print("importing")


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        print("building")
        self.body = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, 2)

    @classmethod
    def small(cls):
        return cls(3)

    def forward(self, x):
        return self.head(self.body(x))


def grown():
    return pbfx.grow(pbfx.transform(Net()), 2)


def fails():
    raise ValueError("no weights\\nanywhere.")


def deep_fails():
    return nn.Linear(3, "wide")


def quits():
    raise SystemExit("goodbye")


def number():
    return 3


def sized(width, *more, depth, **options):
    return Net(width)


def lazy():
    return nn.LazyLinear(3)


def nothing():
    return nn.LSTM(2, 2)


wide = functools.partial(Net, 16)
ready = Net()
answer = 42
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in a folder with modules; forget them afterwards."""
    files = {
        "mynets.py": NETS,
        "needy.py": "import a_package_that_is_absent\n",
        "broken.py": "1 / 0\n",
        "garbled.py": "def f(:\n",
        "exits.py": "import sys\nsys.exit(3)\n",
        "bundle/__init__.py": "",
        "bundle/nets.py": "from mynets import Net\nanswer = 42\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {Path(file).parts[0].removesuffix(".py") for file in files}:
            del sys.modules[name]
    importlib.invalidate_caches()


def test_a_class_of_the_current_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "mynets:Net"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "Net: 2 sites, captured whole",
        "58 of 58 parameters of linear and conv ops can grow (100.0 %)",
        "",
        "site      op      norm       dendrites  parameters  one more",
        "body.0    linear  LayerNorm          0          40       +48",
        "head      linear                     0          18       +20",
        "total x2                                        58       +68",
        "",
        "no dendrites at body.1 (LayerNorm): not a linear or conv operation",
    ]
    # What the user's code prints is out of the way of what reads the output.
    assert shown.err.splitlines() == ["importing", "building", "building"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("mynets:Net.small", "Net: 2 sites"),
        ("mynets:ready", "58 of 58"),
        ("mynets:wide", "114 of 114"),
        ("mynets:grown", "LayerNorm          2"),
        ("bundle.nets:Net", "Net: 2 sites"),
        ("mynets:nothing", "no linear or conv op has parameters"),
    ],
)
def test_what_may_be_named(
    target: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", target]) == 0
    assert expected in capsys.readouterr().out


def test_json_is_all_of_stdout(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "--json", "mynets:Net"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pbfx.explain(sys.modules["mynets"].Net()).to_json()


def test_patterns(folder: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--include", "body*", "--include", "he*", "--exclude", "head", "--json"]
    assert main(["explain", "mynets:Net", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in found["sites"]] == ["body.0"]
    assert {"name": "head", "op": "linear", "reason": "excluded by 'head'"} in found["skipped"]


def test_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", "mynets:Net", "--draw", "net.svg"]) == 0
    assert "body.0" in (folder / "net.svg").read_text()
    assert capsys.readouterr().out.startswith("Net: 2 sites")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mynets"], "the model is named MODULE:CALLABLE, as in train:Net; got 'mynets'"),
        ([":Net"], "got ':Net'"),
        (["mynets:"], "got 'mynets:'"),
        (["mynest:Net"], "no module 'mynest'; in the current folder: did you mean 'mynets'"),
        (["bundle.net:Net"], "no module 'bundle.net'; did you mean 'nets'"),
        (["mynets.deep:Net"], "no module 'mynets.deep'; 'mynets' is a module, not a package"),
        ([".mynets:Net"], "'.mynets' is no name of a module"),
        (["mynets:Nett"], "mynets has no 'Nett'; did you mean 'Net'"),
        (["mynets:Net.smoll"], "mynets.Net has no 'smoll'; did you mean 'small'"),
        (["mynets:answer.x"], "mynets.answer has no 'x'"),
        (["mynets:answer"], "mynets:answer cannot be called; it is an object of class int"),
        (["mynets:sized"], "mynets:sized needs arguments (width, depth)"),
        (["mynets:number"], "gives no nn.Module; got an object of class int"),
        (["mynets:fails"], "fails: ValueError: no weights anywhere (mynets.py, line"),
        (["mynets:deep_fails"], "mynets.py, line"),
        (["mynets:quits"], "building mynets:quits fails: SystemExit: goodbye"),
        (["needy:Net"], "importing needy fails: ModuleNotFoundError: No module named 'a_package"),
        (["broken:Net"], "importing broken fails: ZeroDivisionError: division by zero (broken.py"),
        (["garbled:Net"], "importing garbled fails: SyntaxError"),
        (["exits:Net"], "importing exits fails: SystemExit: 3"),
        (["mynets:lazy"], "LazyLinear has no shape yet"),
        (["mynets:Net", "--include", "bodi*"], "include='bodi*' matches no eligible op"),
        (["mynets:Net", "--exclude", "*"], "leave no site to grow on"),
        (["mynets:grown", "--include", "*"], "the model is transformed already"),
        (["mynets:Net", "--draw", "net.gif"], "must end in .png or .svg, got 'net.gif'"),
        (["mynets:Net", "--draw", "no/net.png"], "there is no folder 'no'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_exit_2(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if line not in ("importing", "building")]
    assert line.startswith("pbfx: ")
    assert says in line


def test_interruption(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (folder / "slow.py").write_text("raise KeyboardInterrupt\n")
    assert main(["explain", "slow:Net"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_shell_finds_the_current_folder_and_prints_80_columns_in_any_encoding(folder: Path):
    (folder / "long.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    inner = nn.Sequential(nn.Linear(3, 3))\n"
        "    for _ in range(6):\n"
        "        outer = nn.Sequential()\n"
        "        outer.add_module('a_rather_long_name', inner)\n"
        "        inner = outer\n"
        "    return inner\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", "from pbfx.cli import main; exit(main())", "explain", "long:net"],
        cwd=folder,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("?")
    assert "long_name.0  linear" in lines[-1]


def test_a_reader_that_has_enough_is_no_error(folder: Path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from pbfx.cli import main; exit(main())", "explain", "mynets:Net"],
        cwd=folder,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["importing", "building", "building"]


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "explain" in shown
    assert max(map(len, shown.splitlines())) <= 80
