"""The command line: a settings dataclass becomes flags, a YAML recipe sets their defaults, mistakes become one line.

    @dataclass
    class Settings:
        eps: float = flag(4.0, "attack radius, in 1/255", group="attack", minimum=0)

A script calls ``parse_settings(Settings)`` inside ``run(main)``. Flags win over ``--config recipe.yaml``, which wins
over the defaults. Both give texts as they were written, and ``_convert`` alone reads them: YAML's own idea of types
(``010`` is 8, ``no`` is false, ``1:30`` is 90) has no say.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import errno
import logging
import math
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml

from utils.errors import UserError
from utils.redaction import shown_setting
from utils.streams import outlive_streams
from utils.text_files import decode_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

MAX_RECIPE_BYTES = 1 << 20  # a recipe has some hundred lines

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


@dataclasses.dataclass
class Flag:
    """A settings field: what ``flag`` takes, which is kept as the field's metadata, and what the field's type says."""

    default: Any
    help: str  # with the unit
    group: str  # in --help
    choices: Sequence[str] | None = None
    minimum: float | None = None  # allowed itself
    above: float | None = None  # not allowed itself
    maximum: float | None = None  # allowed itself
    path: bool = False  # a path, or a name that is looked up as one: ~ is the home directory
    in_recipe: bool = True  # False: recipes come from others, the command line alone may say it
    required: bool = False
    waives_required: bool = False  # where it is true it asks for something other than a run
    type: type = str  # of one value
    many: bool = False
    optional: bool = False  # may be None


def flag(default: Any, help: str, **rules: Any) -> Any:
    """A settings field. ``rules`` are those of ``Flag``; a list default is copied per instance."""
    metadata = vars(Flag(default, help, **rules))
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, group: str, many: bool = False, path: bool = False) -> Any:
    """A settings field that has to be given. ``many`` makes it a list."""
    return flag([] if many else None, help, group=group, path=path, required=True)


def parse_settings(
    settings_class: type[SettingsT], argv: Sequence[str] | None = None, *, description: str | None = None
) -> SettingsT:
    """Reads ``argv`` (default: the process's own) and the recipe it names. Raises ``UserError`` for any mistake."""
    flags = _flags(settings_class)
    given = _read_command_line(sys.argv[1:] if argv is None else argv, flags)
    if given is None:
        print(_help(flags, description or ""))
        sys.exit(0)
    written = {}
    if "config" in given:
        recipe = with_home(given.pop("config"), "--config")
        written = {name: (value, f"{recipe}: {name}") for name, value in _read_recipe(recipe, flags).items()}
    written |= {name: (value, f"--{name}") for name, value in given.items()}
    settings = settings_class(**{name: _convert(value, flags[name], where) for name, (value, where) in written.items()})
    if not any(flag.waives_required and getattr(settings, name) for name, flag in flags.items()):
        for name, flag in flags.items():
            if flag.required and getattr(settings, name) in (None, []):
                raise UserError(f"--{name}: missing; {flag.help}")
    return settings


def _flags(settings_class: type[DataclassInstance]) -> dict[str, Flag]:
    flags, hints = {}, typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        hint, arguments = hints[field.name], typing.get_args(hints[field.name])
        optional = type(None) in arguments
        if optional:
            hint = next(argument for argument in arguments if argument is not type(None))
        many = typing.get_origin(hint) is list
        of_type = {"type": typing.get_args(hint)[0] if many else hint, "many": many, "optional": optional}
        flags[field.name] = Flag(**{**field.metadata, **of_type})
    return flags


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None where nothing is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error line that names what was meant, or nothing."""
    match = nearest(name, known)
    return f", did you mean {prefix}{match}?" if match else ""


_VALUE = re.compile(r"(?!-)|-(\Z|\d|\.|_|inf|nan)", re.IGNORECASE)  # -5e-1 and -.5 are numbers, no flags


def _read_command_line(argv: Sequence[str], flags: dict[str, Flag]) -> dict[str, Any] | None:
    """{flag: text, or list of texts where it takes many} as typed; None for ``--help``.

    A flag of many values may come again and adds to them. Of any other the last value counts, with a warning. argparse
    takes -5e-1 for a flag and drops the first of two lists.
    """
    flags = {"config": Flag(None, "", ""), **flags}
    words, given = list(argv), {}  # type: list[str], dict[str, Any]
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "-h"):
            return None
        if not word.startswith("--") or not name:
            bare = word.lstrip("-")
            if word.startswith("-") and bare.partition("=")[0] in flags:
                raise UserError(f"{_quoted(word)}: a flag has two dashes, did you mean --{bare}?")
            raise UserError(f"{_quoted(word)}: an argument without a flag; write --flag value, or --flag=-value")
        if name not in flags:
            raise UserError(f"--{name}: no such flag{did_you_mean(name, flags, '--')}; --help lists all flags")
        kind, many = flags[name].type, flags[name].many
        values = [value] if equals else []
        while words and not equals and (many or not values) and _VALUE.match(words[0]):
            values.append(words.pop(0))
        if not values and kind is bool:
            values = ["true"]
        if not values:
            dash = f"one that begins with a dash: --{name}=-value"
            raise UserError(f"--{name}: expected {EXPECTED[kind]} after it ({dash})")
        if many:
            given.setdefault(name, []).extend(values)
            continue
        if given.get(name, values[0]) != values[0] and launched_rank() == 0:
            both = f"{_quoted(given[name])} and {_quoted(values[0])}"
            logger.warning("--%s: given twice, %s; the last one counts", name, both)
        given[name] = values[0]
    return given


def _help(flags: dict[str, Flag], description: str) -> str:
    """What ``--help`` prints: the description as it is, then the flags of each group in two columns."""
    rows = {"options": [("-h, --help", "show this help message and exit")]}
    rows["options"].append(("--config FILE", "YAML recipe with defaults for the flags below"))
    for name, flag in flags.items():
        values = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.type.__name__.upper()
        if flag.many:
            values += " ..."
        elif flag.type is bool:
            values = f"[{values}]"
        text = flag.help
        if flag.required:
            text += " (required)"
        elif flag.default not in (None, []):
            typed = " ".join(map(str, flag.default)) if flag.many else str(flag.default)
            text += f" (default: {typed.lower() if flag.type is bool else typed})"
        rows.setdefault(flag.group, []).append((f"--{name} {values}", text))
    column = min(36, 4 + max(len(words) for group in rows.values() for words, _ in group))
    width = max(min(110, shutil.get_terminal_size((110, 24)).columns), column + 11)
    lines = [f"usage: {Path(sys.argv[0]).name} [--config recipe.yaml] [--flag value ...]", "", description.strip()]
    for title, group in rows.items():
        lines += ["", f"{title}:"]
        for words, text in group:
            start = f"  {words}  ".ljust(column)
            if len(start) > column:
                lines.append(start.rstrip())
                start = " " * column
            lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * column)
    return "\n".join(lines)


_OTHER_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # of YAML 1.1 and PyYAML; no editor shows them


class _RecipeLoader(yaml.SafeLoader):
    """Refuses what no recipe needs: a kilobyte of aliases can stand for gigabytes, deep nesting breaks PyYAML."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, found = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent):
            found = "an alias (*)"
        elif event.tag is not None:
            found = "a tag (!)"
        elif self.depth == 2 and isinstance(event, yaml.CollectionStartEvent):
            found = "nested"
        if found:
            where = f"{event.start_mark.name}: line {event.start_mark.line + 1}"
            raise UserError(f"{where}: {found}; expected 'flag: value' or 'flag: [value, ...]' lines")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read_recipe(path: str, flags: dict[str, Flag]) -> dict[str, Any]:
    """{setting: text, list of texts, None where it is empty or null, or {} where it is something nested}."""
    flag_text = f"--config {path}"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{flag_text}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise UserError(f"{flag_text}: more than {MAX_RECIPE_BYTES >> 20} MiB; expected 'flag: value' lines")
    text = decode_text(data, f"{flag_text}: not valid YAML")
    if other := _OTHER_LINE_ENDS.search(text):
        line, code = text.count("\n", 0, other.start()) + 1, f"U+{ord(other[0]):04X}"
        raise UserError(f"{flag_text}: line {line}: holds {code}, which looks like a space; remove it")
    try:
        loader = _RecipeLoader(text)
        loader.name = flag_text
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        # Not the whole text of the error, which shows the line: it may hold a token.
        problem, mark = getattr(error, "problem", error), getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{flag_text}: not valid YAML: {str(problem)[:100]}{place}") from None
    if root is None or _written(root) is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        found = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise UserError(f"{flag_text}: expected 'flag: value' lines, found a {found}")
    recipe: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a key that is no text"
        if key not in flags:
            hint = did_you_mean(key[:100], flags)
            raise UserError(f"{path}: {key[:100]}: no such setting{hint}; --help lists all settings")
        if not flags[key].in_recipe:
            raise UserError(f"{path}: {key}: not in a recipe, which may come from others; say --{key} yourself")
        if key in lines:
            raise UserError(f"{path}: {key}: in line {lines[key]} and again in line {line}; keep one of them")
        recipe[key], lines[key] = _written(value_node), line
    return recipe


def _written(node: yaml.Node) -> Any:
    """The texts of the file. Of YAML's types null alone counts, which no flag can say."""
    if isinstance(node, yaml.SequenceNode):
        return [_written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


TRUE = ("true", "yes", "on", "1")
# Stricter than int() and float(), which also take "1_000", " 4 " and the digits of other scripts.
_GRAMMAR = {
    bool: re.compile("true|yes|on|1|false|no|off|0", re.IGNORECASE | re.ASCII),
    int: re.compile("[+-]?[0-9]+"),
    float: re.compile(
        r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|\.?(inf(inity)?|nan))", re.IGNORECASE | re.ASCII
    ),
}
EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert(value: Any, flag: Flag, where: str) -> Any:
    """A text, a list of texts or None -> what the field's type says. An error line begins with ``where``."""
    items = value if isinstance(value, list) else [value]
    said_none = len(items) == 1 and isinstance(items[0], str) and items[0].lower() == "none"
    if flag.optional and (value is None or said_none):
        return None
    expected = EXPECTED[flag.type]
    if not flag.many and isinstance(value, (list, dict)):
        raise UserError(f"{where}: expected {expected}, found a {type(value).__name__}")
    if any(isinstance(item, (list, dict)) for item in items):
        raise UserError(f"{where}: expected a list of values ({expected} each), found something nested")
    converted = [_convert_one(item, flag, where) for item in items]
    return converted if flag.many else converted[0]


def _convert_one(value: str | None, flag: Flag, where: str) -> Any:
    kind, expected, shown = flag.type, EXPECTED[flag.type], f"{where}: {_quoted(value)}"
    if not value:
        raise UserError(f"{where}: empty; expected {expected}")
    if kind in _GRAMMAR and not _GRAMMAR[kind].fullmatch(value):
        raise UserError(f"{shown} is not {expected}")
    if kind is bool:
        return value.lower() in TRUE
    converted: Any = value
    if kind is float:
        converted = float(re.sub(r"\.(?=[in])", "", value, flags=re.IGNORECASE))  # .inf of YAML
        if not math.isfinite(converted):
            raise UserError(f"{shown} is not finite; expected {expected}")
    elif kind is int:
        # Python turns no text of more than 4300 digits into a whole number.
        if len(value) > 400 or abs(int(value)) >= 2**63:
            raise UserError(f"{shown} is too large; expected {expected} of at most 63 bits")
        converted = int(value)
    elif "\0" in value or not _encodable(value):
        raise UserError(f"{shown} holds a character that no file name or text can have")
    if flag.path:
        converted = with_home(value, where)
    if flag.choices and converted not in flag.choices:
        hint = did_you_mean(value, flag.choices)
        raise UserError(f"{where}: {_quoted(converted)} is not one of {', '.join(flag.choices)}{hint}")
    if flag.minimum is not None and converted < flag.minimum:
        raise UserError(f"{where}: {converted} is too small; expected at least {flag.minimum}")
    if flag.above is not None and converted <= flag.above:
        raise UserError(f"{where}: {converted} is too small; expected more than {flag.above}")
    if flag.maximum is not None and converted > flag.maximum:
        raise UserError(f"{where}: {converted} is too large; expected at most {flag.maximum}")
    return converted


def with_home(text: str, where: str) -> str:
    """``text`` with the home directory for a leading ``~``, unless a file has that very name.

    A shell does it for a word of its own, but not in a recipe, in quotes or after ``--flag=``. Raises ``UserError`` for
    an unknown user and for a variable of the shell: nobody wants a folder of that name.
    """
    if text[:1] not in ("~", "$") or "\0" in text:
        return text
    known = re.split(r"[*?\[{]", text)[0]  # of a pattern the folder in front of it
    if os.path.lexists(text) or (known != text and os.path.lexists(os.path.dirname(known))):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text and text[0] == "~":
        here = f"./{text.split('/')[0]}"
        raise UserError(
            f"{where}: {_quoted(text)}: no such user; write the path out, or {here} for a file of this name"
        )
    if re.match(r"\$(\w+|\{\w+\})(/|$)", text):
        raise UserError(f"{where}: {_quoted(text)}: variables are not filled in here; write the path out")
    return expanded


def _quoted(value: Any) -> str:
    """``repr`` for a message: short, and without secrets."""
    text = repr(shown_setting(value))
    return text if len(text) <= 100 else text[:97] + "..."


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


# How gloo, NCCL and the rendezvous store say that a partner is gone.
_PARTNER_LOST = re.compile(
    r"connection (was )?(closed|reset)|closed by peer|broken pipe|socket closed|timed out waiting|socket timeout|"
    r"pair closure|ncclRemoteError|NCCL watchdog|recvValue failed|failed to recv",
    re.IGNORECASE,
)


def run(main: Callable[[], Any]) -> None:
    """Calls ``main``. ``UserError`` becomes one line on stderr and exit status 2, Ctrl-C status 130.

    Of several processes rank 0 speaks for all, another rank for an error of its own. Where a partner or a data worker
    has died, one line says so and the status is 1. A process of several always ends here.
    """
    outlive_streams()
    rank = launched_rank()
    try:
        try:
            main()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            # Any flag may be a path, and the first to look at it meets this.
            raise UserError(f"{str(error.filename)[:100]}: a file name that is too long; correct the path") from None
    except UserError as error:
        if rank == 0 or not error.every_rank:
            _say(f"error: {error}")
        # Other ranks may wait in a collective: do not wait for them. The launcher ends them.
        _leave(2, at_once=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        if "DataLoader worker (pid" in str(error):
            advice = "if memory runs out, use fewer --num_workers; start again"
            _say(f"error: a data worker has died ({reason}); {advice}")
        elif "RANK" in os.environ and _PARTNER_LOST.search(str(error)):
            advice = "see its message above or in its node's log; go on with --resume_from_checkpoint latest"
            _say(f"rank {rank}: another process of the run has ended or does not answer ({reason}); {advice}")
        else:
            raise
        _leave(1, at_once=True)
    except KeyboardInterrupt:
        _say("interrupted")
        _leave(130, at_once=True)
    except SystemExit as error:
        if isinstance(error.code, int) and multiprocessing.active_children():
            _leave(error.code, at_once=True)  # a data worker that is stuck would be waited for
        if "RANK" not in os.environ or not isinstance(error.code, int):
            raise
        _leave(error.code)
    if "RANK" in os.environ:
        _leave(0)


def launched_rank() -> int:
    """The rank that the launcher gave, 0 without one. Its check refuses what is no number."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def _say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def _leave(status: int, at_once: bool = False) -> NoReturn:
    """Ends the process without the interpreter's own end; ``at_once`` kills its data workers, which may be stuck.

    There a thread of gloo that lets go of its last tensor would abort the process, whatever its status was to be, and
    DistributedDataParallel keeps these threads alive beyond ``destroy_process_group``.
    """
    if at_once:
        for child in multiprocessing.active_children():
            child.kill()
    else:  # what the interpreter's end would have done
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
