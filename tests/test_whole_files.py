"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.whole_files import whole_file, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_whole(path, "old")
    with whole_file(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(IsADirectoryError), whole_file(path) as aside:
        (tmp_path / "folder").write_text("half")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x: cannot be written \(.*\); mend that and start again"):
        write_whole(tmp_path / "file" / "x", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: cannot be written \(Is a directory\); look"):
        write_whole(tmp_path / "folder", b"", "look")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
