"""The command line: a settings dataclass becomes flags, a YAML recipe sets defaults, a mistake prints one error line.

    @dataclass
    class Settings:
        eps: float = flag(4.0, "attack radius, in 1/255", group="attack", minimum=0)

A script calls ``parse_settings(Settings)`` inside ``run(main)``. Flags win over ``--config recipe.yaml``, which wins
over the defaults. argparse and YAML only split the input into texts. ``_convert`` alone turns a text into a value, so
YAML's own types (``010`` is 8, ``no`` is false, ``1:30`` is 90) play no part.
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
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml

from utils.errors import UserError
from utils.redaction import shown_setting
from utils.streams import outlive_streams
from utils.text_files import read_text_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


@dataclasses.dataclass
class Flag:
    """A settings field: the arguments of ``flag``, kept as the field's metadata, and the properties of its type."""

    default: Any
    help: str  # with the unit
    group: str  # in --help
    choices: Sequence[str] | None = None
    minimum: float | None = None  # inclusive
    above: float | None = None  # exclusive
    maximum: float | None = None  # inclusive
    path: bool = False  # a path, or a name that is looked up as one: ~ is the home directory
    in_recipe: bool = True  # False: only the command line may set it, because recipes come from others
    required: bool = False
    waives_required: bool = False  # if it is true, the script does not run, so required flags may be missing
    type: type = str  # of one value
    many: bool = False
    optional: bool = False  # may be None


def flag(default: Any, help: str, **rules: Any) -> Any:
    """A settings field. ``rules`` are fields of ``Flag``. Every instance gets its own copy of a list default."""
    metadata = vars(Flag(default, help, **rules))
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str, *, group: str, many: bool = False, path: bool = False) -> Any:
    """A settings field that the user must give. ``many`` makes it a list."""
    return flag([] if many else None, help, group=group, path=path, required=True)


def parse_settings(
    settings_class: type[SettingsT], argv: Sequence[str] | None = None, *, description: str = ""
) -> SettingsT:
    """Reads ``argv`` (default: ``sys.argv``) and the recipe it names. Raises ``UserError`` for any mistake."""
    flags, hints = {"config": CONFIG}, typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        flags[field.name] = Flag(**{**field.metadata, **_type_of(hints[field.name])})
    typed = _read_command_line(sys.argv[1:] if argv is None else argv, flags, description)
    written = {}
    if "config" in typed:
        recipe = _convert(typed.pop("config"), CONFIG, "--config")
        written = {name: (texts, f"{recipe}: {name}") for name, texts in _read_recipe(recipe, flags).items()}
    written |= {name: (texts, f"--{name}") for name, texts in typed.items()}
    settings = settings_class(**{name: _convert(texts, flags[name], where) for name, (texts, where) in written.items()})
    if not any(flag.waives_required and getattr(settings, name) for name, flag in flags.items()):
        for name, flag in flags.items():
            if flag.required and getattr(settings, name) in (None, []):
                raise UserError(f"--{name}: missing; {flag.help}")
    return settings


CONFIG = Flag(None, "YAML recipe with defaults for the flags below", "options", path=True, in_recipe=False)


def _type_of(hint: Any) -> dict[str, Any]:
    """The fields of ``Flag`` that follow from a type: float, list[str], int | None, list[str] | None, ..."""
    optional = type(None) in typing.get_args(hint)
    if optional:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    many = typing.get_origin(hint) is list
    return {"type": typing.get_args(hint)[0] if many else hint, "many": many, "optional": optional}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to ``name``, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error line: a suggestion if a known name is similar, else an empty text."""
    match = nearest(name, known)
    return f", did you mean {prefix}{match}?" if match else ""


def _read_command_line(argv: Sequence[str], flags: dict[str, Flag], description: str) -> dict[str, list[Any]]:
    """{flag: its texts}. If a flag is repeated, a list is extended; else the last value counts, with a warning."""
    parser = _parser(flags, description)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        sys.exit(0)
    try:
        found, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:  # a flag without its value
        name = (error.argument_name or "").lstrip("-")
        dash = f"one that begins with a dash: --{name}=-value"
        raise UserError(f"--{name}: expected {KINDS[flags[name].type][0]} after it ({dash})") from None
    for word in others:
        if unknown := re.match(r"--?([^\d=-][^=]*)", word):
            hint = did_you_mean(unknown[1], flags, "--")
            raise UserError(f"{unknown[0]}: no such flag{hint}; --help lists all flags")
        raise UserError(f"{_quoted(word)}: an argument without a flag; write --flag value, or --flag=-value")
    given: dict[str, list[Any]] = vars(found)
    for name, texts in given.items():
        if flags[name].many:
            continue
        if len(set(texts)) > 1 and launched_rank() == 0:
            logger.warning("--%s: given twice, %s; the last one counts", name, " and ".join(map(_quoted, texts)))
        given[name] = texts[-1:]
    return given


def _parser(flags: dict[str, Flag], description: str) -> argparse.ArgumentParser:
    columns = min(110, shutil.get_terminal_size((110, 24)).columns)
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [--config recipe.yaml] [--flag value ...]",
        description=description.strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=columns),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    # By default argparse mistakes -5e-1, -.5 and -inf for flags.
    parser._negative_number_matcher = re.compile(r"-(\d|\.|_|inf|nan)", re.IGNORECASE)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(flag.group for flag in flags.values())}
    for name, flag in flags.items():
        text = flag.help
        if flag.required:
            text += " (required)"
        elif flag.default not in (None, []):
            default = " ".join(map(str, flag.default)) if flag.many else str(flag.default)
            text += f" (default: {default.lower() if flag.type is bool else default})"
        switch = flag.type is bool and not flag.many
        groups[flag.group].add_argument(
            f"--{name}",
            metavar="{" + ",".join(flag.choices) + "}" if flag.choices else flag.type.__name__.upper(),
            action="extend" if flag.many else "append",
            nargs="+" if flag.many else "?" if switch else None,
            const="true" if switch else None,
            help=text.replace("%", "%%"),
        )
    return parser


def _read_recipe(path: str, flags: dict[str, Flag]) -> dict[str, list[Any]]:
    """{setting: its texts}; a text is None for YAML's null."""
    where = f"--config {path}"
    text = read_text_file(path, where, limit=1 << 20)  # a recipe has about a hundred lines
    if hidden := re.search("[\x85\u2028\u2029]", text):  # YAML 1.1 and PyYAML break lines at these
        line, code = text.count("\n", 0, hidden.start()) + 1, f"U+{ord(hidden[0]):04X}"
        raise UserError(f"{where}: line {line}: holds {code}, which looks like a space; remove it")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        # The whole text of the error would quote the line, which may hold a token.
        problem = getattr(error, "problem", getattr(error, "reason", "nested too deeply"))
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}: not valid YAML: {str(problem)[:100]}{place}") from None
    if root is None or root.tag == NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{where}: expected 'flag: value' lines")
    recipe: dict[str, list[Any]] = {}
    for key_node, node in root.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a key that is no text"
        if key not in flags:
            hint = did_you_mean(key[:100], flags)
            raise UserError(f"{path}: {key[:100]}: no such setting{hint}; --help lists all settings")
        if not flags[key].in_recipe:
            raise UserError(f"{path}: {key}: not in a recipe, which may come from others; say --{key} yourself")
        if key in recipe:
            raise UserError(f"{path}: {key}: again in line {key_node.start_mark.line + 1}; keep one of them")
        many = flags[key].many
        values = node.value if many and isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(value, yaml.ScalarNode) for value in values):
            expected = f"{'a list of values, each ' if many else ''}{KINDS[flags[key].type][0]}"
            raise UserError(f"{path}: {key}: expected {expected}, found a list or something nested")
        recipe[key] = [None if value.tag == NULL else value.value for value in values]
    return recipe


NULL = "tag:yaml.org,2002:null"
_BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
# Type -> its name in error lines, and the function that reads a text or raises ValueError or KeyError.
KINDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", lambda text: _BOOLS[text.lower()]),
    str: ("a text", lambda text: os.fsdecode(os.fsencode(text))),
}


def _convert(texts: list[str | None], flag: Flag, where: str) -> Any:
    """Converts texts to a value of the field's type. An error line begins with ``where``."""
    if flag.optional and len(texts) == 1 and (texts[0] is None or texts[0].lower() == "none"):
        return None
    values = [_convert_one(text, flag, where) for text in texts]
    return values if flag.many else values[0]


def _convert_one(text: str | None, flag: Flag, where: str) -> Any:
    expected, read = KINDS[flag.type]
    if not text:
        raise UserError(f"{where}: empty; expected {expected}")
    shown = f"{where}: {_quoted(text)}"
    # int() and float() would also accept "1_000", " 4 " and the digits of other scripts.
    allowed = "[^\0]+" if flag.type is str else "[0-9A-Za-z.+-]+"
    try:
        if not re.fullmatch(allowed, text):
            raise ValueError
        value = read(text)
    except (ValueError, KeyError):
        raise UserError(f"{shown} is not {expected}") from None
    if flag.type is float and not math.isfinite(value):
        raise UserError(f"{shown} is not finite; expected {expected}")
    if flag.type is int and abs(value) >= 2**63:
        raise UserError(f"{shown} is too large; expected {expected} of at most 63 bits")
    if flag.path:
        value = with_home(value, where)
    if flag.choices and value not in flag.choices:
        raise UserError(f"{shown} is not one of {', '.join(flag.choices)}{did_you_mean(text, flag.choices)}")
    if flag.minimum is not None and value < flag.minimum:
        raise UserError(f"{where}: {value} is too small; expected at least {flag.minimum}")
    if flag.above is not None and value <= flag.above:
        raise UserError(f"{where}: {value} is too small; expected more than {flag.above}")
    if flag.maximum is not None and value > flag.maximum:
        raise UserError(f"{where}: {value} is too large; expected at most {flag.maximum}")
    return value


def with_home(text: str, where: str) -> str:
    """``text`` with a leading ``~`` replaced by the home directory, unless a file of exactly this name exists.

    A shell does this too, but not in a recipe, in quotes or after ``--flag=``. Raises ``UserError`` for an unknown user
    and for a shell variable: nobody wants a folder of that name.
    """
    known = re.split(r"[*?\[{]", text)[0]  # of a pattern, the part before its first special character
    there = os.path.lexists(text) or (known != text and os.path.lexists(os.path.dirname(known)))
    if text[0] not in "~$" or there:
        return text
    expanded = os.path.expanduser(text)
    if expanded == text and re.match(r"~|\$(\w+|\{\w+\})(/|$)", text):
        wrong = "no such user" if text[0] == "~" else "variables are not filled in here"
        here = f"write the path out, or ./{text.split('/')[0]} for a file of this name"
        raise UserError(f"{where}: {_quoted(text)}: {wrong}; {here}")
    return expanded


def _quoted(value: Any) -> str:
    """A short ``repr`` without secrets, for a message."""
    text = repr(shown_setting(value))
    return text if len(text) <= 100 else text[:97] + "..."


def run(main: Callable[[], Any]) -> None:
    """Calls ``main``. A ``UserError`` prints one line on stderr and exits with status 2, Ctrl-C with status 130.

    If all ranks raise the same error, only rank 0 prints it; a rank prints an error that it alone may have met. If
    another process or a data worker has died, one line says so and the status is 1. A launched process exits here.
    """
    outlive_streams()
    try:
        main()
    except SystemExit as error:
        stuck = bool(multiprocessing.active_children())  # a normal exit would wait for a data worker that is stuck
        if isinstance(error.code, int) and (stuck or "RANK" in os.environ):
            _leave(error.code, at_once=stuck)
        raise
    except BaseException as error:
        status, line = _verdict(error)
        if not status:
            raise
        if line:
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
        # Other ranks may be waiting in a collective. Do not wait for them: the launcher ends them.
        _leave(status, at_once=True)
    if "RANK" in os.environ:
        _leave(0)


# Messages of gloo, NCCL and the rendezvous store when another process is gone.
_PARTNER_LOST = re.compile(
    r"connection (was )?(closed|reset)|closed by peer|broken pipe|socket closed|timed out waiting|socket timeout|"
    r"pair closure|ncclRemoteError|NCCL watchdog|recvValue failed|failed to recv",
    re.IGNORECASE,
)


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit status and the line to print, which may be empty. Status 0 means that the traceback is needed."""
    said, rank = " ".join(str(error).split()), launched_rank()
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # can come from any flag that takes a path
        error = UserError(f"{str(error.filename)[:100]}: a file name that is too long; correct the path")
    if isinstance(error, UserError):
        return 2, "" if rank and error.every_rank else f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in said:
        advice = "if memory runs out, use fewer --num_workers; start again"
        return 1, f"error: a data worker has died ({said[:160]}); {advice}"
    if isinstance(error, RuntimeError) and "RANK" in os.environ and _PARTNER_LOST.search(said):
        advice = "see its message above or in its node's log; go on with --resume_from_checkpoint latest"
        return 1, f"rank {rank}: another process of the run has ended or does not answer ({said[:160]}); {advice}"
    return 0, ""


def launched_rank() -> int:
    """The rank set by the launcher, or 0 without a launcher. ``check_launch`` refuses a RANK that is not a number."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def _leave(status: int, at_once: bool = False) -> NoReturn:
    """Exits without the interpreter's own shutdown; ``at_once`` kills the data workers, which may be stuck.

    During that shutdown a thread of gloo that frees its last tensor would abort the process and so change its exit
    status. DistributedDataParallel keeps these threads alive even after ``destroy_process_group``.
    """
    if at_once:
        for child in multiprocessing.active_children():
            child.kill()
    else:  # as the interpreter's shutdown would have done
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
