"""One way from the bytes of a file to its text, lines, labels and JSON."""

import codecs
import json

import pytest

from examples.pretrain_small_clip import read_words
from utils.errors import UserError
from utils.evaluation.results import Results
from utils.sets.labelled import find_classes, read_classnames, read_templates
from utils.sets.pairs import parse_pair
from utils.text_files import decode_text, parse_json, parse_label, read_text_file, text_lines
from utils.training.metrics import MetricsFile

NAMES = ["cat", "fire truck", "café"]
UNUSUAL = ["a\u2028b", "a\u2029b", "a\u00a0b", "a\u3000b", "a\u200db"]  # one name each


def written(tmp_path, data, name="classnames.txt"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("cat\nfire truck\ncafé\n".encode(), NAMES),
        ("cat\nfire truck\ncafé".encode(), NAMES),
        ("cat\r\nfire truck\r\ncafé\r\n".encode(), NAMES),
        ("cat\r\nfire truck\ncafé\n\n \n\t\r\n".encode(), NAMES),
        ("\ufeffcat\n  fire truck \t\ncafé\n".encode(), NAMES),  # eyegrade#70
        ("\ufeff\ufeffcat\nfire truck\ncafé\n".encode(), NAMES),
        ("\n".join([*UNUSUAL, "dog"]).encode(), [*UNUSUAL, "dog"]),  # datasets#3729, screenplain#5
    ],
)
def test_class_names_are_the_lines_of_their_file(tmp_path, data, names):
    assert read_classnames(written(tmp_path, data)) == names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cat\ndog\n".encode("utf-16"), r"UTF-16, expected UTF-8; save it again as UTF-8"),
        (codecs.BOM_UTF16_BE + "cat\ndog\n".encode("utf-16-be"), r"UTF-16, expected UTF-8"),
        ("cat\ndog\n".encode("utf-32"), r"UTF-32, expected UTF-8"),
        ("cat\ndog\n".encode("utf-16-le"), r"not a UTF-8 text \(a zero byte at 1\)"),
        ("café\n".encode("latin-1"), r"not a UTF-8 text \(byte 0xe9 at 3\); save it again as UTF-8"),
        (b"cat\rdog\rbird", r"line 1 holds a carriage return; save it with lines that end in"),
        (b"cat\r\r\ndog\r\r\n", r"line 1 holds a carriage return"),
        ("cat\n\ufeffdog\n".encode(), r"line 2 holds a byte order mark"),
        (b"cat\n\ndog\n", r"line 2 is empty"),
        (b"cat\n \t\ndog\n", r"line 2 is empty"),
        ("cat\n\u3000\ndog\n".encode(), r"line 2 is empty"),
        (b"cat\na\x0bb\n", r"line 2 is no class name"),
        (b"cat\na\0b\n", r"line 2 is no class name"),
        (b"cat\na\x0cb\n", r"line 2 is no class name"),
        ("cat\na\x85b\n".encode(), r"line 2 is no class name"),
        (b"\n \n", r"holds no class names"),
        (codecs.BOM_UTF8, r"holds no class names"),
    ],
)
def test_files_of_other_encodings_and_line_ends_are_named(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"classnames.txt: {message}"):
        read_classnames(written(tmp_path, data))


def test_templates_are_held_to_the_same_rules(tmp_path):
    (tmp_path / "0.tar").touch()
    written(tmp_path, codecs.BOM_UTF8 + b"cat\r\ndog\r\n")
    written(tmp_path, codecs.BOM_UTF8 + "{c}\u2028.\r\n\r\na {c}\r\n".encode(), "zeroshot_classification_templates.txt")
    assert find_classes([str(tmp_path / "0.tar")], None, "--data") == (["cat", "dog"], ["{c}\u2028.", "a {c}"])
    for data, message in ((b"a {c}\rthe {c}", "carriage return"), (b"a {c}\x0b", None), (b"a\x0c{c}", "control char")):
        path = written(tmp_path, data, "templates.txt")
        if message is None:
            assert read_templates(path) == ["a {c}"]
            continue
        with pytest.raises(UserError, match=message):
            read_templates(path)


def test_words_are_read_as_class_names_are(tmp_path):
    path = written(tmp_path, codecs.BOM_UTF8 + "a\u2028b\r\n\r\nc\r\n".encode(), "words.txt")
    assert read_words(str(path), ["x", "y", "z"]) == [(0, "a\u2028b"), (2, "c")]
    for data, message in (
        (b"a\rb\rc", "carriage return"),
        (b"a\n\n\0c", "line 3 holds control"),
        ("é\n\n\n".encode("latin-1"), "not a UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"--words .*words.txt: .*{message}"):
            read_words(str(written(tmp_path, data, "words.txt")), ["x", "y", "z"])
    with pytest.raises(UserError, match=r"--words .*gone: cannot be read \(No such file"):
        read_words(str(tmp_path / "gone"), ["x"])


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"3", 3), (b"3\n", 3), (b" 3\r\n", 3), (codecs.BOM_UTF8 + b"3", 3), (b"007", 7), (b"-1", -1),
        (b"", None), (b"1_0", None), (b"3.0", None), ("٣".encode(), None), (b"\xff\xfe3\0", None),
        (b"3\0", None), (b"1 2", None), (b"9" * 40, None), (b"\xe9", None),
    ],
)  # fmt: skip
def test_labels_are_plain_whole_numbers(data, label):
    if label is None:
        with pytest.raises(ValueError, match=r"."):
            parse_label(data)
    else:
        assert parse_label(data) == label


def test_a_byte_order_mark_is_no_part_of_json():
    pair = {"chosen": "a\u2028b", "rejected": ["c"]}
    text = json.dumps(pair, ensure_ascii=False)
    for given in (text, "\ufeff" + text, text.encode(), codecs.BOM_UTF8 + text.encode()):
        assert parse_json(given) == pair
    row, _ = parse_pair(codecs.BOM_UTF8 + text.encode(), "key", "0.tar#key")
    assert (row.chosen, row.rejected) == ("a\u2028b", ["c"])


def test_what_is_written_line_by_line_is_read_line_by_line(tmp_path, monkeypatch):
    """Also by hand: names that hold U+2028 as they are break no row."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 1, "text": "a\u2028b\x85c"})
    with metrics.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "text": "a\u2028b\x85c"}\n')
    assert [row["text"] for row in metrics.read()] == ["a\u2028b\x85c"] * 2
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(Results, "records_path", lambda self, cell: path)
    path.write_text('{"position": 0, "key": "a\u2028b"}\n{"position": 1, "key": "c"}\n', encoding="utf-8")
    assert [row["key"] for row in Results(tmp_path).records({})] == ["a\u2028b", "c"]


def test_lines_and_texts(tmp_path):
    assert text_lines("") == []
    assert text_lines("a\n\nb") == ["a", "", "b"]
    assert decode_text(b"\xef\xbb\xbfa", "x") == "a"
    with pytest.raises(UserError, match=r"x: cannot be read \(Is a directory\)"):
        read_text_file(tmp_path, "x")
