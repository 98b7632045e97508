"""What is read from outside can neither run code, nor write elsewhere, nor take all memory, nor show a token."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

import evaluate
import train_lore
from tests.conftest import ROOT, flags
from tests.mutations import png, seal
from tests.shard_maker import ShardServer, add_member, image_bytes, make_shards, write_shard
from utils.cli import parse_settings
from utils.data import sources as shard_sources
from utils.data import tars as tar_index
from utils.data.images import MAX_PIXELS, MAX_SIDE, ImageError, ImageTransform, decode
from utils.data.shards import MAX_SAMPLE_BYTES, ShardDataset, ShardReader, index_shards
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import read_text
from utils.data.tars import scan_tar
from utils.errors import UserError
from utils.evaluation.results import Results
from utils.models.published import load_model
from utils.redaction import display_url, printable, shown_setting, without_secrets
from utils.sets.labelled import find_classes, read_classnames
from utils.sets.pairs import PairDataset
from utils.text_files import parse_json

# ---------------------------------------------------------------------------------------------------- what runs no code

# (file, call): why it is there all the same.
ALLOWED = {
    ("utils/data/sources.py", "subprocess.Popen"): "pipe: URLs, after --allow_pipe_urls on the command line",
}
NEVER = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen", "shutil.unpack_archive", "gopen"),
    *("pandas.read_pickle", "torch.hub.load", "importlib.import_module", "runpy.run_path"),
}
NEVER_METHODS = {"extract", "extractall", "load_state"}  # of a tar or zip archive; of an Accelerator
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "from_pretrained": ("trust_remote_code", False),
}


def dangerous_calls(source: str) -> list[str]:
    """The names of the calls in a Python file that could run code or write where data from outside says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, method = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in NEVER or (method in NEVER_METHODS and isinstance(node.func, ast.Attribute)):
            found.append(method if method in NEVER_METHODS else name)
        if given.get("shell") is True or given.get("trust_remote_code") is True:
            found.append(name)
        for call, (argument, value) in NEEDED.items():
            if call in (name, method) and given.get(argument) is not value:
                found.append(call)
    return found


def test_nothing_in_the_source_runs_what_it_reads():
    files = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    files += (ROOT / "benchmarks").glob("*.py")
    assert len(files) > 40
    found = [
        (str(path.relative_to(ROOT)), call)
        for path in files
        for call in dangerous_calls(path.read_text(encoding="utf-8"))
    ]
    assert [place for place in found if place not in ALLOWED] == []


def test_the_scan_of_the_source_finds_what_it_looks_for():
    bad = [
        "pickle.loads(data)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text, Loader=x)", "eval(text)", "exec(text)", "os.system(text)",
        "subprocess.run(text, shell=True)", "tar.extractall(folder)", "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)", "gopen(url)", "accelerator.load_state(folder)",
    ]  # fmt: skip
    good = [
        "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "model.eval()",
        "yaml.safe_load(text)", "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "subprocess.run(words)", "module.load_state_dict(x)",
    ]  # fmt: skip
    assert [call for call in bad if not dangerous_calls(call)] == []
    assert [call for call in good if dangerous_calls(call)] == []


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_model_directory_runs_no_code(small_clip, tmp_path):
    model, marker = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    for path in small_clip.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text()) if (model / name).exists() else {}
        kinds = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
        settings["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (model / name).write_text(json.dumps(settings))
    torch.save({"logit_scale": Touch(marker)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"--model .*model"):
        load_model(str(model), "--model")
    (model / "model.safetensors").write_bytes((small_clip / "model.safetensors").read_bytes())
    (model / "pytorch_model.bin").unlink()
    load_model(str(model), "--model")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        ("config.json", b"[]"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"model_type": "clip", "vision_config": 3}'),
        ("config.json", b'{"model_type": "clip", "vision_config": {"hidden_size": "many"}}'),
        ("config.json", b'{"model_type": ["clip"]}'),
        ("tokenizer.json", b'{"model": {}}'),
        ("processor_config.json", b'{"image_processor": 3}'),
        ("model.safetensors", b"\xff" * 100),
    ],
    ids=lambda change: f"{change[0]}-{change[1][:60]}",
)
def test_a_broken_model_directory_is_one_line(small_clip, tmp_path, change):
    model = tmp_path / "model"
    model.mkdir()
    for path in small_clip.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / change[0]).write_bytes(change[1])
    with pytest.raises(UserError, match=r"^--model .*model: "):
        load_model(str(model), "--model")


def test_class_names_run_no_command(tmp_path):
    """They may come from a recipe."""
    with pytest.raises(UserError, match="runs a shell command"):
        find_classes(["0.tar"], f"pipe:touch {tmp_path / 'ran'}; echo cat", "--train_shards", str(tmp_path / "cache"))
    assert not (tmp_path / "ran").exists()


def test_only_the_command_line_allows_pipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_shards: 'pipe:echo'\nallow_pipe_urls: true\n")
    with pytest.raises(UserError, match="allow_pipe_urls: not in a recipe"):
        parse_settings(train_lore.Settings, ["--config", str(recipe)])


# ------------------------------------------------------------------------------------------------------------- memory


def png_header(width: int, height: int, depth: int = 8, colour: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def compressed_zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count % (1 << 20))), packer.flush()])


def bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes."""
    tiny = (b"IDAT", zlib.compress(bytes(100)))
    end = (b"IEND", b"")
    webp = image_bytes(0, (16, 16), "WEBP")[12:]
    bmp, gif = (bytearray(image_bytes(0, (16, 16), kind)) for kind in ("BMP", "GIF"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    jpeg = bytearray(image_bytes(0, (16, 16)))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65_535, 65_535)
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0" + webp
    small = png_header(8, 8)
    text = b"a\0\0" + zlib.compress(bytes(100 << 20))
    rows = compressed_zeros(50_000 * (50_000 // 8 + 1))
    return {
        "png header": png([png_header(50_000, 50_000), tiny, end]),
        "png with all its rows": png([png_header(50_000, 50_000, depth=1), (b"IDAT", rows), end]),
        "png at Pillow's own limit": png([png_header(13_377, 13_377), tiny, end]),
        "one row": png([png_header(1_000_000, 1), tiny, end]),
        "one column": png([png_header(1, 60_000), (b"IDAT", zlib.compress(bytes(120_000))), end]),
        "compressed text": png([small, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(72))), end]),
        "colour profile": png([small, (b"iCCP", text), (b"IDAT", zlib.compress(bytes(72))), end]),
        "many texts": png([small, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 100, tiny, end]),
        "animation control": png([small, (b"acTL", struct.pack(">II", 2**31, 0)), tiny, end]),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "jpeg": bytes(jpeg),
        "webp": b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas,
    }


def test_image_bombs_take_neither_memory_nor_time(tmp_path):
    """In a process of its own, whose peak no other test has raised."""
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    script = """
import resource, sys, time, warnings
from pathlib import Path
from utils.data.images import ImageError, ImageTransform, decode
warnings.simplefilter("ignore")
transforms = [ImageTransform(), ImageTransform((224, 224), None), ImageTransform(None, (8, 8))]
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    for number, transform in enumerate(transforms):
        before, clock, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), "decoded"
        try:
            decode(data, transform)
        except ImageError as error:
            end = "refused"
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{path.name}|{number}|{end}|{growth:.0f}|{time.process_time() - clock:.2f}")
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120, check=True)
    lines = [line.split("|") for line in result.stdout.splitlines()]
    assert len(lines) == 3 * len(bombs())
    # An unknown number of frames, and one column of 60,000 pixels that is not made wider, are images.
    decoded = {(name, number) for name, number, end, *_ in lines if end == "decoded"}
    assert {name for name, _ in decoded} <= {"animation control", "one column"}
    assert ("one column", "0") not in decoded
    for name, number, _, mebibytes, seconds in lines:
        assert float(mebibytes) < 200, (name, number, mebibytes)
        assert float(seconds) < 2, (name, number, seconds)


def test_limits_of_images_are_where_they_are_said_to_be():
    end = (b"IEND", b"")
    whole = png([png_header(MAX_SIDE, 1), (b"IDAT", zlib.compress(bytes(MAX_SIDE + 1))), end])
    assert decode(whole, ImageTransform(None, (1, 1))).shape == (3, 1, 1)
    for width, height in ((MAX_SIDE + 1, 1), (MAX_PIXELS // 9000 + 1, 9000)):
        beyond = png([png_header(width, height), (b"IDAT", zlib.compress(bytes(10))), end])
        with pytest.raises(ImageError, match=f"{width} x {height} pixels, at most"):
            decode(beyond, ImageTransform())


def test_a_bomb_in_a_shard_is_a_sample_that_is_skipped(tmp_path):
    bomb = png([png_header(50_000, 50_000), (b"IDAT", zlib.compress(bytes(10)))])
    path = write_shard(tmp_path / "0.tar", [("bomb", {"png": bomb}), ("good", {"jpg": image_bytes(0)})])
    data = ShardDataset(
        index_shards([path], cache_dir=tmp_path / "cache"), ImageTransform(8, (8, 8)), order="sequential"
    )
    bad, good = (data[0, slot, slot] for slot in range(2))
    assert (bad["image"], bad["skipped"][0].kind) == (None, "undecodable image")
    assert good["image"].shape == (3, 8, 8)


def sparse_shard(path: Path, members: list[tuple[str, int, int]], end: int) -> str:
    """A tar of (name, claimed size, bytes to the next header) whose members are holes; ``end`` is the file's size."""
    with path.open("wb") as file:
        for name, size, step in members:
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(step, os.SEEK_CUR)
        file.truncate(end)
    return str(path)


@pytest.mark.parametrize(
    ("name", "size"),
    [("a.jpg", 10 << 30), ("a.jpg", MAX_SAMPLE_BYTES + 1), ("a.json", 2 << 20), ("a.cls", 2000), ("a.tiff", 10 << 30)],
)
def test_members_are_measured_before_they_are_read(tmp_path, name, size):
    """The file is a hole of this size, so that the header does not lie."""
    length = (size + 511) // 512 * 512
    path = sparse_shard(tmp_path / "0.tar", [(name, size, length), ("b.cls", 1, 512)], 512 + length + 4096)
    index = index_shards([path], cache_dir=tmp_path / "cache")
    reader = ShardReader(index)
    tracemalloc.start()
    with pytest.raises(BadSample, match=f"oversized member: .*#a: .*{size} bytes, at most"):
        reader.read(0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert reader.read(0, 1)[1] == {"cls": b"\0"}
    reader.close()


def test_members_of_a_sample_are_measured_together(tmp_path):
    each = MAX_SAMPLE_BYTES // 4
    members = [(f"a.{extension}", each, each) for extension in ("jpg", "png", "webp", "jpeg", "gif")]
    path = sparse_shard(tmp_path / "0.tar", members, 5 * (each + 512) + 1024)
    reader = ShardReader(index_shards([path], cache_dir=tmp_path / "cache"))
    with pytest.raises(BadSample, match=f"oversized member: .*all members: {5 * each} bytes, at most"):
        reader.read(0, 0)
    assert len(reader.read(0, 0, ["gif"])[1]["gif"]) == each
    reader.close()


@pytest.mark.parametrize("size", [10**10, 2**63 - 1, 2**63, 2**80, -1, -(2**70)])
@pytest.mark.parametrize("kind", [b"0", b"7", b"L", b"K", b"x", b"g", b"N", b"V", b"S", b"D", b"?"])
def test_headers_that_lie_about_sizes_end_the_pass(tmp_path, kind, size):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
    header[156:157] = kind
    seal(header)
    (tmp_path / "0.tar").write_bytes(bytes(header) + bytes(4096))
    found = scan_tar(tmp_path / "0.tar")
    assert (len(found), bool(found.damage)) == (0, True)


def test_pax_headers_that_lie_end_the_pass(tmp_path):
    def record(key: str, value: str) -> bytes:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        return f"{length} {key}={value}\n".encode()

    for body in (record("size", "9" * 5000), record("size", "9" * 19), record("path", "p" * 5000 + "/a.jpg")):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(body)
        member = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
        padded = body + bytes(-len(body) % 512)
        (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + padded + member + bytes(4096))
        assert scan_tar(tmp_path / "0.tar").damage


def test_the_number_of_members_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "MAX_MEMBERS", 10)
    path = write_shard(tmp_path / "0.tar", [(f"{number:03d}", {"cls": b"0"}) for number in range(20)])
    assert "more than 10 members" in scan_tar(path).damage


def test_a_promise_of_too_many_samples_is_no_promise(tmp_path):
    paths = make_shards(tmp_path, [3])
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 10**15}))
    assert index_shards(paths, cache_dir=tmp_path / "cache").sizes == [3]


def test_links_and_devices_are_not_followed(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(image_bytes(0))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, kind in enumerate(
            (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            link = tarfile.TarInfo(f"{number}.jpg")
            link.type, link.linkname = kind, str(tmp_path / "secret.jpg") if number < 2 else ""
            tar.addfile(link)
        for name, other in (("a.jpg", "b.jpg"), ("b.jpg", "a.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, other
            tar.addfile(link)
        add_member(tar, "good.jpg", image_bytes(1))
    found = scan_tar(tmp_path / "0.tar")
    assert (found.keys, found.damage) == (["good"], None)


HOSTILE_NAMES = [
    "../../outside", "/absolute", "line\nbreak", "\x1b]0;title\x07\x1b[2J", "bell\x07", "right\u202eleft", "nul",
    b"not \xff utf-8".decode("utf-8", "surrogateescape"), "l" * 200, "label=\x1b[31mcat_text=dog", "[red]rich[/blue]",
]  # fmt: skip


def test_hostile_names_neither_lead_elsewhere_nor_reach_a_terminal(tmp_path):
    folder = tmp_path / "inside" / "deeper"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(HOSTILE_NAMES):
            add_member(tar, f"{name}{number}.jpg", image_bytes(number) if number % 2 else b"broken")
    before = set(tmp_path.rglob("*"))
    index = index_shards([str(folder / "0.tar")], cache_dir=folder / "cache")
    assert index.num_samples == len(HOSTILE_NAMES)
    for kind in (ShardDataset, PairDataset):
        data = kind(index, ImageTransform(8, (8, 8)), order="sequential")
        for slot in range(len(data)):
            item = data[0, slot, slot]
            item["key"].encode()
            assert all((record.where + record.detail).isprintable() for record in item["skipped"])
            assert item["skipped"] or slot % 2
    assert set(tmp_path.rglob("*")) - before <= set((folder / "cache").rglob("*")) | {folder / "cache"}


def test_digits_that_are_no_numbers_in_file_names(tmp_path):
    paths = make_shards(tmp_path, [1, 1])
    for path, name in zip(paths, ("²3.tar", "٣.tar")):
        Path(path).rename(tmp_path / name)
    assert {Path(url).name for url in shard_sources.expand_shards([str(tmp_path)])} == {"²3.tar", "٣.tar"}


def test_texts_are_shown_without_control_characters():
    assert printable("a\x1b[2J\n\ud800ä😀") == "a\\x1b[2J\\n\\ud800ä😀"
    assert printable(printable("a\x1b")) == printable("a\x1b")
    assert str(UserError("two\nlines\x1b[2J")) == "two lines\\x1b[2J"
    record = Skipped("bad label", "w" * 5000, "d\x07" * 5000)
    assert len(record.where) < 1100
    assert len(record.detail) < 400
    assert Skipped(record.kind, record.where, record.detail) == record  # as after a checkpoint


# --------------------------------------------------------------------------------------------------------------- texts


def test_long_texts_are_not_read_to_their_end(tmp_path, monkeypatch):
    with (tmp_path / "classnames.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"classnames.txt: more than 64 MiB"):
        read_classnames(tmp_path / "classnames.txt")
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"recipe.yaml: more than 1 MiB"):
        parse_settings(train_lore.Settings, ["--config", str(tmp_path / "recipe.yaml")])

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the other side hangs up
                while True:
                    self.wfile.write(bytes(1 << 16))

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(shard_sources, "MAX_TEXT_BYTES", 1 << 20)
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        read_text(f"http://127.0.0.1:{server.server_port}/classnames.txt", tmp_path / "cache")
    server.server_close()


@pytest.mark.parametrize(
    "names", [b"cat\n\x1b[2J\n", b"cat\ndo\x00g\n", b"cat\n" + b"d" * 5000], ids=["escape", "NUL", "long"]
)
def test_class_names_are_names(tmp_path, names):
    (tmp_path / "names.txt").write_bytes(names)
    with pytest.raises(UserError, match="line 2 is no class name"):
        read_classnames(tmp_path / "names.txt")


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in zip("abcdefghijklmno", "bcdefghijklmnop")
)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LAUGHS, "a: no such setting"),
        (MERGES, "a: no such setting"),
        ("eps: " + "[" * 50_000, "nested"),
        ("{eps: " * 50_000, "nested"),
        ("- " * 50_000, "nested"),
        ("eps: !!python/object/apply:os.system [touch x]", "found a list"),
        ("eps: !!bool maybe", "'maybe' is not a number"),
        ("train_shards: &a [x, *a]", "nested"),
        ("eps: 2024-99-99", "'2024-99-99' is not a number"),
        ("seed: " + "9" * 5000, "is not a whole number"),
        ("seed: " + "9" * 50, "is too large"),
        ("seed: 0x" + "f" * 5000, "is not a whole number"),
        ('output_dir: "a\\0b"', "is not a text"),
        ('output_dir: "\\ud800"', "is not a text"),
        ("train_shards: [[a]]", "nested"),
        ("train_shards: {a: b}", "train_shards: expected a list of values"),
    ],
    ids=lambda value: value[:30],
)
def test_recipes_are_flat_and_short(tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(UserError, match=message) as caught:
        parse_settings(train_lore.Settings, ["--config", str(path)])
    assert len(str(caught.value)) < 600


def test_json_from_outside_is_finite_and_flat_enough():
    assert parse_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    for text in ("NaN", "-Infinity", "1e999", "9" * 30, "[" * 100_000, '{"a":' * 100_000, "", "{", b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011, ValueError alone is what is promised
            parse_json(text)


def test_a_report_of_somebody_else_is_checked(tmp_path):
    cell = {"model": "m", "dataset": "d", "measure": "accuracy", "attack": "apgd", "eps": 4.0, "seed": 0}
    cell |= dict.fromkeys(("sigma", "corruption", "severity")) | {"settings": {}}
    results = Results(tmp_path)
    results.add(cell, 0.5, (0.4, 0.6), 10)
    results.write()
    assert len(Results(tmp_path).results) == 1
    good = (tmp_path / "results.json").read_text()
    changes = [
        ("value", None),
        ("n", 0),
        ("eps", None),
        ("eps", "4"),
        ("ci95", [1]),
        ("measure", "x"),
        ("settings", []),
    ]
    for name, value in changes:
        report = json.loads(good)
        report["results"][0][name] = value
        (tmp_path / "results.json").write_text(json.dumps(report))
        with pytest.raises(UserError, match=r"results\.json is not a report"):
            Results(tmp_path)


# -------------------------------------------------------------------------------------------------------------- tokens


def test_urls_are_shown_without_what_may_be_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "SECRETinTheEnvironment")
    secrets = [
        "https://user:SECRET@host/a.tar", "https://SECRET@host/a.tar", "https://host/a.tar?token=SECRET",
        "s3://key:SECRET@b/a", "https://host/a.tar?a=1#b?SECRET=3 SECRET", "https://user:p?SECRET@host/a.tar",
        "https://user:p#SECRET@host/a.tar",
        "pipe:curl -H 'Authorization: Bearer SECRET' https://host", "pipe:TOKEN=SECRET curl https://host/a.tar",
        "pipe:SECRET;x", "hf_" + "SECRET" * 6, "xSECRETinTheEnvironmentx",
        "hf://datasets/o/n@hf_" + "SECRET" * 6 + "/a.tar",
    ]  # fmt: skip
    for secret in secrets:
        assert "SECRET" not in str(shown_setting(secret)).replace("pipe:SECRET;x", ""), secret
        assert "SECRET" not in str(shown_setting([secret])), secret
        if " SECRET" not in secret or secret.startswith("pipe:"):  # in a text a blank ends a URL
            text = f"--train_shards {secret}"
            assert "SECRET" not in without_secrets(text), secret
            assert without_secrets(without_secrets(text)) == without_secrets(text)
    for harmless in (
        "data/train-{000..010}.tar",
        "https://host/a.tar#key",
        "runs/a: nothing is there",
        "hf://datasets/o/n/a.tar",
    ):
        assert without_secrets(harmless) == harmless
    assert without_secrets(f"x {display_url('pipe:cat a b')}: y") == f"x {display_url('pipe:cat a b')}: y"


def test_error_lines_hold_no_token(tmp_path, capsys, monkeypatch):
    """Mistakes with a token in every value, each up to its error line."""
    recipe = tmp_path / "recipe.yaml"
    urls = (
        "https://user:SECRET@127.0.0.1:9/a.tar?token=SECRET",
        "http://user:SECRET@localhost/a.tar",  # Python takes the password for a port, and says so
        "http://127.0.0.1:9/{0..2}.tar?SECRET",
        "http://127.0.0.1:9/*.tar?SECRET",
        "http://127.0.0.1:9/a.tar.gz?SECRET",
        "s3://key:SECRET@bucket/a.tar",
        "hf://SECRET@x/y",
        "pipe:curl -H 'Authorization: Bearer SECRET' http://127.0.0.1:9",
    )
    monkeypatch.setattr(shard_sources, "RETRY_DELAY", 0.0)
    needed = {"model_name_or_path": tmp_path / "none", "train_shards": tmp_path, "output_dir": tmp_path / "run"}
    wrong = []
    for url in urls:
        wrong += [flags(needed | {"train_shards": url, "cache_dir": tmp_path / "cache"})]
        wrong += [
            flags(needed | {name: url}) for name in ("eps", "seed", "compile", "objective", "epochs", "classnames")
        ]
        wrong += [flags(needed | {"model_name_or_path": url}), [url], [f"--{url}"], [f"--eps={url}"], ["--config", url]]
        for text in (
            f"eps: [{url!r}",
            f"{url!r}: 3",
            f"eps: {url!r}",
            f"eps: {url} [",
            f"? [{url!r}]\n",
            f"a: *{url}",
            "eps: SECRET: 3",
        ):
            recipe.write_text(text)
            wrong.append(["--config", str(recipe)])
            wrong.append([*flags(needed), "--config", str(recipe)])
    for argv in wrong:
        with pytest.raises(UserError) as caught:
            train_lore.main(list(map(str, argv)))
        assert "SECRET" not in str(caught.value), argv
    assert "SECRET" not in "".join(capsys.readouterr())


def test_a_run_leaves_no_token(small_clip, digits, tmp_path, monkeypatch, capfd, caplog):
    """A token in every place where one works: nothing that is written or said holds it."""
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETinTheEnvironment")
    monkeypatch.setenv("WANDB_API_KEY", "SECRETinTheEnvironment")
    shard = sorted((digits / "train").glob("*.tar"))[0]
    run, cache = tmp_path / "run", tmp_path / "cache"
    with ShardServer(digits) as server:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"eval_shards: ['pipe:cat {shard} #SECRETinPipe']\neval_num_samples: 8\n")
        argv = [
            *flags({"model_name_or_path": small_clip, "config": recipe, "output_dir": run, "cache_dir": cache}),
            *("--allow_pipe_urls", f"--train_shards={server.url}/train/{shard.name}?token=SECRETinQuery"),
            *("--classnames", f"{server.url}/classnames.txt?token=SECRETinNames", "--num_workers", "0"),
            *("--max_steps", "1"),
            *flags({"per_device_train_batch_size": 4, "attack_steps": 1, "primal_steps": 1, "checkpoint_steps": 1}),
            *("--report_to", "tensorboard", "--keep_best", "eval_accuracy_clean"),
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train_lore.py", *argv])
        train_lore.main()
        argv = [
            *flags(
                {"model": run, "data": digits, "num_samples": 8, "output_dir": tmp_path / "eval", "cache_dir": cache}
            ),
            *("--classnames", f"{server.url}/classnames.txt?token=SECRETinNames", "--num_workers", "0"),
        ]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
        evaluate.main()
    recipe.unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"README.md", "metrics.jsonl", "trainer_state.json", "results.json", "report.html"} <= names
    assert any("tfevents" in name for name in names)
    assert "train_shards" in (run / "README.md").read_text()
    assert [path for path in files if b"SECRET" in path.read_bytes() or "SECRET" in str(path)] == []
    shown = "".join(capfd.readouterr()) + caplog.text
    assert "accuracy" in shown
    assert "SECRET" not in shown
