"""The command line: a settings dataclass becomes flags, a YAML recipe sets defaults, mistakes become one line.

A script declares its settings once::

    @dataclass
    class Settings:
        eps: float = flag(4.0, "attack radius, in 1/255", group="attack", minimum=0)

and calls ``parse_settings(Settings)`` inside ``run(main)``. Flags win over ``--config recipe.yaml``, which wins over
the defaults. Whatever the user got wrong ends as one line on stderr and exit status 2.

A recipe and the command line have one grammar: both give texts, as they were written, and ``_convert`` alone makes
numbers, truths and paths of them. YAML's own idea of types (``010`` is 8, ``no`` is false, ``1:30`` is 90) has no say.
"""

from __future__ import annotations

import argparse
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
import threading
import types
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


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    path: bool = False,
    in_recipe: bool = True,
    waives_required: bool = False,
) -> Any:
    """A settings field: its default, its help text (with the unit), its group in ``--help`` and its allowed values.

    ``minimum`` and ``maximum`` are allowed themselves, ``above`` is not. A list default is copied per instance.
    ``path``: the text is a path or a list of them (or a name that is looked up as one), where ``~`` is the home directory.
    ``in_recipe``: False for what only the command line may say, because recipes come from others. Where a flag that
    ``waives_required`` is true, the required ones may be missing: it asks for something other than a run.
    """
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "path": path,
        "in_recipe": in_recipe,
        "waives_required": waives_required,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_settings(
    settings_class: type[SettingsT], argv: Sequence[str] | None = None, *, description: str | None = None
) -> SettingsT:
    """Reads ``argv`` (default: the process's own) and the recipe it names into ``settings_class``.

    Raises ``UserError`` for an unknown flag or recipe key (with the nearest known name), a value of the wrong type and
    a value out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    hints = typing.get_type_hints(settings_class)
    given = _read_command_line(argv, {name: _unpack_type(hints[name])[:2] for name in fields})
    if "help" in given:
        _help_parser(settings_class, description).print_help()
        sys.exit(0)

    values: dict[str, tuple[Any, str]] = {}
    if "config" in given:
        recipe = with_home(given.pop("config"), "--config")
        values = {key: (value, f"{recipe}: {key}") for key, value in _read_recipe(recipe, fields).items()}
    values |= {name: (value, f"--{name}") for name, value in given.items()}
    settings = settings_class(
        **{name: _convert(value, hints[name], fields[name], where) for name, (value, where) in values.items()}
    )
    waived = any(field.metadata["waives_required"] and getattr(settings, name) for name, field in fields.items())
    for name, field in fields.items():
        if not waived and field.metadata.get("required") and getattr(settings, name) in (None, []):
            raise UserError(f"--{name}: missing; {field.metadata['help']}")
    return settings


def required(help: str, *, group: str, many: bool = False, path: bool = False) -> Any:
    """A settings field without a default: ``parse_settings`` refuses to go on without it. ``many`` makes it a list."""
    field = flag([] if many else None, help, group=group, path=path)
    field.metadata = types.MappingProxyType({**field.metadata, "required": True})
    return field


# How gloo, NCCL and the rendezvous store say that a partner is gone.
_PARTNER_LOST = re.compile(
    r"connection (was )?(closed|reset)|closed by peer|broken pipe|socket closed|timed out waiting|socket timeout|"
    r"pair closure|ncclRemoteError|NCCL watchdog|recvValue failed|failed to recv",
    re.IGNORECASE,
)


def run(main: Callable[[], Any]) -> None:
    """Calls ``main`` and turns ``UserError`` into one line on stderr and exit status 2, Ctrl-C into status 130.

    Under several processes rank 0 speaks for all; another rank speaks where the error is its own. A process whose partner
    has died says so in one line and ends with status 1. A process of several ends here in every case. What is printed
    cannot end the process: ``utils/streams.py``.
    """
    outlive_streams()
    script = Path(sys.argv[0]).name
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
            line = " ".join(str(error).split())
            print(f"{script}: error: {line}", file=sys.stderr, flush=True)
        # The other ranks may be waiting in a collective: leave without waiting for them. The launcher ends them.
        _leave_at_once(2)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            reason = " ".join(str(error).split())[:160]
            print(
                f"{script}: error: a data worker has died ({reason}); if memory runs out, use fewer --num_workers; start again",
                file=sys.stderr,
                flush=True,
            )
            _leave_at_once(1)
        if "RANK" not in os.environ or not _PARTNER_LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:160]
        print(
            f"{script}: rank {rank}: another process of the run has ended or does not answer ({reason}); its own message "
            "is above or in the log of its node; go on with --resume_from_checkpoint latest",
            file=sys.stderr,
            flush=True,
        )
        _leave_at_once(1)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr, flush=True)
        _leave_at_once(130)
    except SystemExit as error:
        if isinstance(error.code, int) and multiprocessing.active_children():
            _leave_at_once(error.code)  # a data worker that is stuck would be waited for
        if "RANK" not in os.environ or not isinstance(error.code, int):
            raise
        _leave(error.code)
    if "RANK" in os.environ:
        _leave(0)


def launched_rank() -> int:
    """The rank that the launcher gave, 0 without one; what is no number is the launcher's check to refuse."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def _leave_at_once(status: int) -> NoReturn:
    """Ends the process without waiting for anything; its data workers, which may be stuck, with it."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave(status: int) -> NoReturn:
    """Ends a process of several without the interpreter's own end.

    A thread of gloo that lets go of its last tensor during that end aborts the process, whatever its status was to be; and
    DistributedDataParallel keeps these threads alive beyond ``destroy_process_group``.
    """
    # What the interpreter's end would have done: threads, handlers, streams.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None where nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    match = nearest(name, known)
    return f", did you mean {prefix}{match}?" if match else ""


_NEGATIVE = re.compile(r"-(\d|\.|_|inf|nan)", re.IGNORECASE)  # how a number may begin; -5e-1 and -.5 are no flags


def _read_command_line(argv: Sequence[str], kinds: dict[str, tuple[type, bool]]) -> dict[str, Any]:
    """{flag: text, or list of texts where it takes many} as typed; ``help``: True. ``kinds``: (type, takes many) by flag.

    ``--flag value ...`` or ``--flag=value``. A flag of many values may come again and adds to them; of any other the
    last value counts, with a warning where it differs.
    """
    kinds = {"config": (str, False), **kinds}
    words, given = list(argv), {}  # type: list[str], dict[str, Any]
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word in ("--help", "-h"):
            return {"help": True}
        if not word.startswith("--") or not name:
            if word.startswith("-") and word.lstrip("-").partition("=")[0] in kinds:
                raise UserError(f"{_quoted(word)}: a flag has two dashes, did you mean --{word.lstrip('-')}?")
            raise UserError(
                f"{_quoted(word)}: an argument without a flag; every value follows its flag, as in --eps 4 (one that "
                "begins with a dash: --flag=-value)"
            )
        if name not in kinds:
            raise UserError(f"--{name}: no such flag{_did_you_mean(name, kinds, prefix='--')}; --help lists all flags")
        kind, many = kinds[name]
        values = [value] if equals else []
        while words and not equals and (many or not values) and _is_value(words[0]):
            values.append(words.pop(0))
        if not values and kind is bool:
            values = ["true"]
        if not values:
            raise UserError(
                f"--{name}: expected {_describe(kind)} after it (one that begins with a dash: --{name}=-value)"
            )
        if many:
            given.setdefault(name, []).extend(values)
        else:
            if given.get(name, values[0]) != values[0] and launched_rank() == 0:
                logger.warning(
                    "--%s: given twice, %s and %s; the last one counts", name, *map(_quoted, (given[name], values[0]))
                )
            given[name] = values[0]
    return given


def _is_value(word: str) -> bool:
    return not word.startswith("-") or word == "-" or _NEGATIVE.match(word) is not None


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the line breaks of the description, leaves out metavars that repeat the flag's name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=min(110, shutil.get_terminal_size((110, 24)).columns))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.strip().splitlines())

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[-1]} {self._format_args(action, '')}"


def _help_parser(settings_class: type[DataclassInstance], description: str | None) -> argparse.ArgumentParser:
    """Knows the flags for ``--help`` alone: argparse takes -5e-1 for a flag and drops the first of two lists."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [--config recipe.yaml] [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML recipe with defaults for the flags below")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind, is_list, _ = _unpack_type(hints[field.name])
        options: dict[str, Any] = {"metavar": kind.__name__.upper(), "help": _help_text(field)}
        if field.metadata["choices"]:
            options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
        if is_list:
            options["nargs"] = "+"
        elif kind is bool:
            options.update(nargs="?", const="true")
        groups[group].add_argument(f"--{field.name}", **options)
    return parser


def _help_text(field: dataclasses.Field) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    text = field.metadata["help"].replace("%", "%%")
    if field.metadata.get("required"):
        return f"{text} (required)"
    if default in (None, []):
        return text
    typed = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"{text} (default: {typed.lower() if isinstance(default, bool) else typed})"


# PyYAML ends a line at these, as YAML 1.1 had it; no editor shows it.
_OTHER_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def _read_recipe(path: str, fields: dict[str, dataclasses.Field]) -> dict[str, Any]:
    """{setting: text, list of texts, None where it is empty or null, or {} where it is something nested}."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise UserError(f"--config {path}: more than {MAX_RECIPE_BYTES >> 20} MiB; expected 'flag: value' lines")
    text = decode_text(data, f"--config {path}: not valid YAML")
    if other := _OTHER_LINE_ENDS.search(text):
        line = text.count("\n", 0, other.start()) + 1
        raise UserError(
            f"--config {path}: line {line}: holds U+{ord(other[0]):04X}, which looks like a space; remove it"
        )
    try:
        _refuse_what_no_recipe_needs(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # Not the whole text of the error, which shows the line: it may hold a token.
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {path}: not valid YAML: {str(error.problem)[:100]}{place}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {str(error)[:100]}") from None
    if root is None or _written(root) is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        found = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise UserError(f"--config {path}: expected 'flag: value' lines, found a {found}")
    recipe: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str) or key not in fields:
            shown = key[:100] if isinstance(key, str) else "a key that is no text"
            raise UserError(
                f"{path}: {shown}: no such setting{_did_you_mean(shown, fields)}; --help lists all settings"
            )
        if not fields[key].metadata["in_recipe"]:
            raise UserError(f"{path}: {key}: not in a recipe, which may come from others; say --{key} yourself")
        if key in lines:
            raise UserError(f"{path}: {key}: in line {lines[key]} and again in line {line}; keep one of them")
        recipe[key], lines[key] = _written(value_node), line
    return recipe


def _written(node: yaml.Node) -> Any:
    """What stands in the file: YAML's types are not looked at, but for null, which no flag can say."""
    if isinstance(node, yaml.SequenceNode):
        return [_written(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _refuse_what_no_recipe_needs(text: str, path: str) -> None:
    """UserError for aliases, tags and nesting. A kilobyte of aliases can stand for gigabytes, deep nesting breaks PyYAML."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        found = None
        if isinstance(event, yaml.AliasEvent):
            found = "an alias (*)"
        elif getattr(event, "tag", None) is not None:
            found = "a tag (!)"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            found = "nested" if depth > 2 else None
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if found:
            line = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
            raise UserError(f"--config {path}: {line}{found}; expected 'flag: value' or 'flag: [value, ...]' lines")


def _unpack_type(hint: Any) -> tuple[type, bool, bool]:
    """Type hint -> (element type, is a list, may be None)."""
    arguments = typing.get_args(hint)
    optional = type(None) in arguments
    if optional:
        hint = next(argument for argument in arguments if argument is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _convert(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    """A text, a list of texts or None -> what the field's type says. Raises ``UserError`` that begins with ``where``."""
    kind, is_list, optional = _unpack_type(hint)
    single = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or (optional and isinstance(single, str) and single.lower() == "none"):
        if optional:
            return None
        raise UserError(f"{where}: empty; expected {_describe(kind)}")
    if is_list:
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in values):
            raise UserError(f"{where}: expected a list of values ({_describe(kind)} each), found something nested")
        return [_convert_one(item, kind, field, where) for item in values]
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: expected {_describe(kind)}, found a {type(value).__name__}")
    return _convert_one(value, kind, field, where)


TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# Stricter than int() and float(), which also take "1_000", " 4 " and the digits of other scripts.
_NUMBERS = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|\.?(inf(inity)?|nan))", re.IGNORECASE),
}
MOST_DIGITS = 400  # Python turns no text of more than 4300 into a whole number


def _convert_one(value: str | None, kind: type, field: dataclasses.Field, where: str) -> Any:
    if not value:
        raise UserError(f"{where}: empty; expected {_describe(kind)}")
    converted: Any = value
    if kind is bool:
        if value.lower() not in TRUTHS:
            raise UserError(f"{where}: {_quoted(value)} is not true or false")
        return TRUTHS[value.lower()]
    if kind in _NUMBERS:
        if not _NUMBERS[kind].fullmatch(value):
            raise UserError(f"{where}: {_quoted(value)} is not {_describe(kind)}")
        if kind is int and len(value) > MOST_DIGITS:
            raise UserError(f"{where}: {_quoted(value)} is too large; expected {_describe(kind)} of at most 63 bits")
        digits = re.sub(r"\.(?=[in])", "", value, flags=re.IGNORECASE) if kind is float else value  # .inf of YAML
        converted = kind(digits)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{where}: {_quoted(value)} is not finite; expected {_describe(kind)}")
    if isinstance(converted, int) and abs(converted) >= 2**63:
        raise UserError(f"{where}: {_quoted(value)} is too large; expected {_describe(kind)} of at most 63 bits")
    if isinstance(converted, str) and ("\0" in converted or not _encodable(converted)):
        raise UserError(f"{where}: {_quoted(value)} holds a character that no file name or text can have")
    limits = field.metadata
    if limits["path"]:
        converted = with_home(converted, where)
    if limits["choices"] and converted not in limits["choices"]:
        hint = _did_you_mean(str(converted), limits["choices"])
        raise UserError(f"{where}: {_quoted(converted)} is not one of {', '.join(limits['choices'])}{hint}")
    if limits["minimum"] is not None and converted < limits["minimum"]:
        raise UserError(f"{where}: {converted} is too small; expected at least {limits['minimum']}")
    if limits["above"] is not None and converted <= limits["above"]:
        raise UserError(f"{where}: {converted} is too small; expected more than {limits['above']}")
    if limits["maximum"] is not None and converted > limits["maximum"]:
        raise UserError(f"{where}: {converted} is too large; expected at most {limits['maximum']}")
    return converted


def with_home(text: str, where: str) -> str:
    """``text`` with the home directory in place of a leading ``~``, where nothing is called so as it is written.

    A shell does that for a word of its own, but not in a recipe, in quotes or after ``--flag=``. Raises ``UserError`` for
    a user who does not exist, and for a variable of the shell: a folder of that name is what nobody wants.
    """
    if text[:1] not in ("~", "$") or "\0" in text:
        return text
    known = re.split(r"[*?\[{]", text)[0]  # of a pattern the folder in front of it
    if os.path.lexists(text) or (known != text and os.path.lexists(os.path.dirname(known))):
        return text
    expanded = os.path.expanduser(text)
    if expanded != text:
        return expanded
    if text[0] == "~":
        raise UserError(
            f"{where}: {_quoted(text)}: no such user; write the path out, or ./{text.split('/')[0]} for a file of this name"
        )
    if re.match(r"\$(\w+|\{\w+\})(/|$)", text):
        raise UserError(f"{where}: {_quoted(text)}: variables are not filled in here; write the path out")
    return text


def _describe(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)


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
