"""Files are there whole, or as they were."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

import pbfx
from learning.loops import Mlp
from pbfx import CheckpointError
from pbfx.files import atomic_path


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == tmp_path, "a rename is atomic within one folder only"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("new")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("fault", ["write", "replace"])
def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model, path = pbfx.transform(Mlp()), tmp_path / "m.safetensors"
    pbfx.save(model, path)
    old = path.read_bytes()
    with torch.no_grad():
        model.fc1.weight.add_(1)

    def broken(*args: object, **_: object) -> None:
        if fault == "write":
            Path(str(args[1])).write_text("half")
        raise OSError("disk full")

    target = "pbfx.checkpoint.save_file" if fault == "write" else "os.replace"
    monkeypatch.setattr(target, broken)
    with pytest.raises(
        CheckpointError, match=r"pbfx.save: cannot write \S+m.safetensors: disk full"
    ):
        pbfx.save(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_save_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"pbfx.save: cannot write \S+/none/m: .*No such file"
    ):
        pbfx.save(pbfx.transform(Mlp()), tmp_path / "none" / "m")
