"""The command line: a settings dataclass becomes flags, a YAML recipe sets defaults, mistakes become one line.

A script declares its settings once::

    @dataclass
    class Settings:
        eps: float = flag(4.0, "attack radius, in 1/255", group="attack", minimum=0)

and calls ``parse_settings(Settings)`` inside ``run(main)``. Flags win over ``--config recipe.yaml``, which wins over
the defaults. Whatever the user got wrong ends as one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import difflib
import errno
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

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
    in_recipe: bool = True,
    waives_required: bool = False,
) -> Any:
    """A settings field: its default, its help text (with the unit), its group in ``--help`` and its allowed values.

    ``minimum`` and ``maximum`` are allowed themselves, ``above`` is not. A list default is copied per instance.
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
    parser = _build_parser(settings_class, description)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        name = word.split("=", 1)[0]
        if name.startswith("--"):
            raise UserError(
                f"{name}: no such flag{_did_you_mean(name[2:], fields, prefix='--')}; --help lists all flags"
            )
    if unknown:
        raise UserError(
            f"{_quoted(unknown[0])}: an argument without a flag; every value follows its flag, as in --eps 4"
        )

    values = {}
    if given.config is not None:
        values = {key: (value, f"{given.config}: {key}") for key, value in _read_recipe(given.config, fields).items()}
    for name in fields:
        if hasattr(given, name):
            values[name] = (getattr(given, name), f"--{name}")
    hints = typing.get_type_hints(settings_class)
    settings = settings_class(
        **{name: _convert(value, hints[name], fields[name], where) for name, (value, where) in values.items()}
    )
    waived = any(field.metadata["waives_required"] and getattr(settings, name) for name, field in fields.items())
    for name, field in fields.items():
        if not waived and field.metadata.get("required") and getattr(settings, name) in (None, []):
            raise UserError(f"--{name}: missing; {field.metadata['help']}")
    return settings


def required(help: str, *, group: str, many: bool = False) -> Any:
    """A settings field without a default: ``parse_settings`` refuses to go on without it. ``many`` makes it a list."""
    field = flag([] if many else None, help, group=group)
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
    rank = int(os.environ.get("RANK", "0"))
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


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


def _build_parser(settings_class: type[DataclassInstance], description: str | None) -> argparse.ArgumentParser:
    """Every flag takes plain strings here; ``_convert`` gives flags and recipes the same errors."""
    parser = _Parser(
        description=description,
        usage="%(prog)s [--config recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
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


def _read_recipe(path: str, fields: dict[str, dataclasses.Field]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
        if len(data) > MAX_RECIPE_BYTES:
            raise UserError(f"--config {path}: more than {MAX_RECIPE_BYTES >> 20} MiB; expected 'flag: value' lines")
        text = data.decode("utf-8")
        _refuse_what_no_recipe_needs(text, path)
        recipe = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not valid YAML: not a UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        # Not the whole text of the error, which shows the line: it may hold a token.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {path}: not valid YAML: {str(error.problem)[:100]}{line}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML: {str(error)[:100]}") from None
    except ValueError:  # what looks like a date and is none, or a number of thousands of digits
        raise UserError(f"--config {path}: not valid YAML: holds a date or number that does not exist") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: expected 'flag: value' lines, found a {type(recipe).__name__}")
    for key in recipe:
        if key not in fields:
            key = str(key)[:100] if isinstance(key, str) else _quoted(key)
            raise UserError(f"{path}: {key}: no such setting{_did_you_mean(key, fields)}; --help lists all settings")
        if not fields[key].metadata["in_recipe"]:
            raise UserError(f"{path}: {key}: not in a recipe, which may come from others; say --{key} yourself")
    return recipe


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
    kind, is_list, optional = _unpack_type(hint)
    if value is None or (isinstance(value, str) and value.lower() == "none" and optional):
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


def _convert_one(value: Any, kind: type, field: dataclasses.Field, where: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1"):
            return True
        if str(value).lower() in ("false", "no", "0"):
            return False
        raise UserError(f"{where}: {_quoted(value)} is not true or false")
    if isinstance(value, bool) and kind in (int, float):
        raise UserError(f"{where}: {_quoted(value)} is not {_describe(kind)}")
    try:
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        converted = kind(value)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{where}: {_quoted(value)} is not {_describe(kind)}") from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{where}: {_quoted(value)} is not finite; expected {_describe(kind)}")
    if isinstance(converted, int) and abs(converted) >= 2**63:
        raise UserError(f"{where}: {_quoted(value)} is too large; expected {_describe(kind)} of at most 63 bits")
    if isinstance(converted, str) and ("\0" in converted or not _encodable(converted)):
        raise UserError(f"{where}: {_quoted(value)} holds a character that no file name or text can have")
    limits = field.metadata
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


def _describe(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)


def _quoted(value: Any) -> str:
    """``repr`` for a message: short, and without secrets."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number of more than 63 bits"  # of more than 4300 digits Python makes no text
    text = repr(shown_setting(value))
    return text if len(text) <= 100 else text[:97] + "..."


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
