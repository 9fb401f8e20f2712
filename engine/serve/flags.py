"""Flags and YAML to configurations: everything is derived from the settings of engine/core/config.py.

It does not know what a setting means. A flag beats the file, the file beats the default; every problem is reported at
once, one line each; nothing here raises anything but ConfigError, or exits but for --help and --version.
"""

from __future__ import annotations

import argparse
import dataclasses
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import engine
from engine.core.config import REFUSED_SETTINGS, EngineConfig, ServerConfig, make
from engine.core.errors import ConfigError
from engine.core.knobs import Setting, near, settings

MISSING = "\0missing"
GROUPS = {
    "model": "model", "server": "server", "access": "keys", "scheduler": "scheduling", "memory": "KV memory",
    "engine": "execution", "scx": "SCX",
}  # fmt: skip
MAX_FILE_BYTES = 1 << 20
METAVARS = {"int": "N", "float": "X", "str": "TEXT"}


@dataclass(frozen=True, slots=True)
class Launch:
    """What to serve and how. api_keys: those of --api-key and --api-key-file together."""

    engine: EngineConfig
    server: ServerConfig
    api_keys: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Help(argparse.HelpFormatter):
    """Values without brackets, and a width for people."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == 0 else str(action.metavar or "")


def all_settings() -> tuple[Setting, ...]:
    """Every setting of the engine and the server."""
    return (*settings(EngineConfig), *settings(ServerConfig))


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the serve command. Values stay text; what they mean is decided in one place, by `make`."""
    parser = _Parser(
        prog=prog, allow_abbrev=False, formatter_class=_Help, argument_default=argparse.SUPPRESS,
        usage=f"{prog} [--model MODEL] [--port N] [--config FILE.yaml] [flags]",
        description="Serve a language model over HTTP with OpenAI's routes. Without --model: SmolLM2-135M-Instruct.",
        epilog="Names may be written with dashes or underscores. A flag beats the file, the file beats the default.")
    parser.add_argument("positional", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--config", nargs="?", const=MISSING, metavar="FILE.yaml",
                        help="read settings from a file; the keys are the flags' names")
    parser.add_argument("--version", action="version", version=f"tessera {engine.__version__}")
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items()}
    for setting in all_settings():
        _add_flag(groups[setting.knob.group], setting)
    for name in REFUSED_SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, nargs="?", const="true", help=argparse.SUPPRESS)
    return parser


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    knob, switch = setting.knob, setting.kind == "bool"
    others = [name.replace("_", "-") for name in setting.names if name.replace("_", "-") != setting.flag]
    default = knob.default_text or (knob.infinite if setting.default == float("inf") else setting.default)
    short = [alias for alias in knob.aliases if "scheduler-" not in alias]  # the long ones work, but explain nothing
    text = knob.help + (f"; also --{', --'.join(short)}" if short else "")
    text += "" if switch else f" [{default}]"
    metavar = "" if switch else "{" + ",".join(knob.choices) + "}" if knob.choices else METAVARS[setting.kind]
    const = "true" if switch else MISSING
    group.add_argument(f"--{setting.flag}", dest=setting.name, nargs="?", const=const, metavar=metavar,
                       help=text.replace("%", "%%"))
    for other in others:
        group.add_argument(f"--{other}", dest=setting.name, nargs="?", const=const, help=argparse.SUPPRESS)
    if switch:
        for name in (setting.flag, *others):
            group.add_argument(f"--no-{name}", dest=setting.name, action="store_const", const="false",
                               help=argparse.SUPPRESS)


def dashed(argv: Sequence[str]) -> list[str]:
    """Underscores in flags' names (not in their values) become dashes."""
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        found.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return found


def _from_flags(argv: Sequence[str], prog: str, problems: list[str]) -> dict[str, Any]:
    parser = build_parser(prog)
    try:
        known, unknown = parser.parse_known_args(dashed(argv))
    except ConfigError as error:
        problems.append(str(error))
        return {}
    names = [option for action in parser._actions for option in action.option_strings]
    after_unknown = False
    for word in unknown:
        if word.startswith("-") and word != "-":
            flag = word.partition("=")[0]
            problems.append(f"flag {flag} is unknown{near(flag, names)}")
            after_unknown = "=" not in word
        elif not after_unknown:
            problems.append(f"argument {word!r} is not expected; flags start with --")
    given = dict(vars(known))
    for name, value in list(given.items()):
        if value == MISSING:
            problems.append(f"--{name.replace('_', '-')} needs a value")
            del given[name]
    if "positional" in given:
        model = given.pop("positional")
        if unknown:  # it may be the value of a flag that is unknown
            return given
        if "model" in given:
            problems.append(f"argument {model!r} is not expected beside --model")
        given.setdefault("model", model)
    return given


def _from_file(name: str, problems: list[str]) -> dict[str, Any]:
    """The settings of a YAML file, by their names in Python."""
    import yaml

    path = Path(name)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"more than {MAX_FILE_BYTES} bytes")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ConfigError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        problems.append(f"--config {name}: {reason}")
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(f"--config {name}: holds a {type(values).__name__}, not settings (name: value)")
        return {}
    by_name = {spelled: setting for setting in all_settings() for spelled in setting.names}
    found: dict[str, Any] = {}
    for key, value in values.items():
        spelled = str(key).replace("-", "_")
        setting = by_name.get(spelled)
        if setting is None:
            reason = REFUSED_SETTINGS.get(spelled)
            problems.append(f"--config {name}: " + (f"{key}: {reason}" if reason else
                            f"setting {str(key)!r} is unknown{near(spelled, list(by_name))}"))  # fmt: skip
        elif setting.name in found:
            problems.append(f"--config {name}: {key} is given twice, by two of its names")
        elif value is not None:
            found[setting.name] = value
    if any(setting.endswith("_key") for setting in found):
        problems += _readable_by_others(path, "--config")
    return found


def _readable_by_others(path: Path, flag: str) -> list[str]:
    """A problem when anyone but the owner may read a file with keys."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return [f"{flag} {path}: holds keys and others may read it (mode {mode:03o}); chmod 600 it"]
    return []


def _keys(server: ServerConfig, problems: list[str]) -> tuple[str, ...]:
    """Every API key."""
    keys = [server.api_key] if server.api_key is not None else []
    if server.api_key_file is None:
        return tuple(keys)
    path = Path(server.api_key_file)
    try:
        problems += _readable_by_others(path, "--api-key-file")
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not ASCII"
        problems.append(f"--api-key-file {path}: {reason}")
        return tuple(keys)
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        problems.append(f"--api-key-file {path}: holds no key; an empty secret would be no check at all")
    for number, key in enumerate(found, 1):
        if len(key) < 4 or not key.isprintable() or " " in key:
            problems.append(f"--api-key-file {path}: key {number} is not 4 or more printable signs without spaces")
    return (*keys, *found)


def parse(argv: Sequence[str], prog: str) -> Launch:
    """Flags (and the file they name) to a Launch. Raises ConfigError with every problem, one a line."""
    problems: list[str] = []
    given = _from_flags(argv, prog, problems)
    file = given.pop("config", None)
    merged = {**(_from_file(file, problems) if file is not None else {}), **given}
    of_server = {setting.name for setting in settings(ServerConfig)}
    made: dict[str, Any] = {}
    kind: Any
    for kind, mine in (
        (EngineConfig, {name: value for name, value in merged.items() if name not in of_server}),
        (ServerConfig, {name: value for name, value in merged.items() if name in of_server}),
    ):
        try:
            made[kind.__name__] = make(kind, mine)
        except ConfigError as error:
            problems += str(error).split("\n")
    keys = _keys(made["ServerConfig"], problems) if "ServerConfig" in made else ()
    if problems:
        raise ConfigError("\n".join(problems))
    engine: EngineConfig = made["EngineConfig"]
    if len(set(keys)) > 1:  # several tenants: no page may carry one's contents to another
        engine = dataclasses.replace(engine, kv_clear=True)
    return Launch(engine, made["ServerConfig"], keys)
