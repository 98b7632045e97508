"""What of a folder is a picture, and the account of the rest; most is tested where make_shards reads such folders."""

import os

from utils.data.folders import describe, is_picture, is_system, subfolders, walk


def test_names():
    assert all(map(is_picture, ["a.JPG", "a.jpe", "b.jfif", "c.x.Tiff", "d.avif", "e.GIF"]))
    assert not any(map(is_picture, ["jpg", ".jpg", "._a.jpg", "a.jpg.part", "a.heic", "a.txt"]))
    assert all(map(is_system, [".cache", "@eaDir", "__MACOSX", "$Recycle.Bin", "System Volume Information"]))
    assert not any(map(is_system, ["cat", "n01440764", "@home", "_x"]))


def test_every_folder_is_visited_once_in_the_same_order(tmp_path):
    for place in ("c/inner", "b"):
        (tmp_path / "root" / place).mkdir(parents=True)
    (tmp_path / "root/a").symlink_to("c")
    (tmp_path / "root/b/up").symlink_to(tmp_path)
    (tmp_path / "root/c/inner/x.jpg").touch()
    left_out = {}
    visited = [os.path.relpath(place, tmp_path) for place, _ in walk(tmp_path / "root", left_out, tmp_path / "root")]
    assert visited == ["root", "root/a", "root/a/inner", "root/b"]
    assert describe(left_out) == "2 links to folders that are read already (b/up/, c/)"
    assert describe({}) == ""
    assert subfolders(tmp_path / "nowhere") == []
