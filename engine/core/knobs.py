"""What a setting is: a typed dataclass field with its range and help, and how text becomes its value.

It does not know which settings exist (engine/core/config.py does), nor argparse or YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Knob:
    """What is known of one setting beside its type and default. lo and hi are inclusive."""

    help: str
    lo: float | None = None
    hi: float | None = None
    choices: tuple[str, ...] = ()
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    infinite: str | None = None  # a word for infinity, where infinity is allowed
    may_be_empty: bool = False  # of a text: "" is a value
    default_text: str | None = None  # what --help says instead of None
    group: str = "engine"


def knob(default: Any, **facts: Any) -> Any:
    """A dataclass field with a Knob's facts; the type is the field's annotation."""
    return dataclasses.field(default=default, metadata={"knob": Knob(**facts)})


@dataclass(frozen=True, slots=True)
class Setting:
    """One field as seen from outside: `name` is the attribute, `kind` is int, float, str or bool."""

    name: str
    kind: str
    optional: bool
    many: bool
    default: Any
    knob: Knob

    @property
    def flag(self) -> str:
        """The flag without leading dashes, e.g. `chunk-size`."""
        return self.knob.flag or self.name.replace("_", "-")

    @property
    def names(self) -> tuple[str, ...]:
        """Every accepted spelling, with underscores: attribute, flag, aliases."""
        spelled = (self.name, self.flag, *self.knob.aliases)
        return tuple(dict.fromkeys(name.replace("-", "_") for name in spelled))


def settings(kind: type[Any]) -> tuple[Setting, ...]:
    """Every setting of a configuration class, in order."""
    found = []
    for field in dataclasses.fields(kind):
        spelled = str(field.type)
        many = spelled.startswith("tuple")
        base = "str" if many else spelled.removesuffix(" | None")
        found.append(Setting(field.name, base, spelled.endswith("| None"), many, field.default,
                             cast(Knob, field.metadata["knob"])))
    return tuple(found)


def near(name: str, known: tuple[str, ...] | list[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _range_text(setting: Setting) -> str:
    low, high = ("" if end is None else str(end) for end in (setting.knob.lo, setting.knob.hi))
    return f"{low}..{high}" + (f" or {setting.knob.infinite}" if setting.knob.infinite else "")


def _number_problem(setting: Setting, value: Any) -> str | None:
    kinds: tuple[type, ...] = (int,) if setting.kind == "int" else (int, float)
    what = "an integer" if setting.kind == "int" else "a number"
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if good and math.isinf(value) and value > 0 and setting.knob.infinite:
        return None
    low, high = setting.knob.lo, setting.knob.hi
    if good and (low is None or value >= low) and (high is None or value <= high) and not math.isnan(value):
        return None
    return f"--{setting.flag} {value!r} is not {what} in {_range_text(setting)}"


def value_problem(setting: Setting, value: Any) -> str | None:
    """What is wrong with one value, or None."""
    if value is None:
        return None if setting.optional else f"--{setting.flag} needs a value"
    if setting.kind in ("int", "float"):
        return _number_problem(setting, value)
    if setting.kind == "bool":
        return None if isinstance(value, bool) else f"--{setting.flag} {value!r} is not true or false"
    if setting.many:
        good = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
        return None if good else f"--{setting.flag} {value!r} is not a list of names"
    if not isinstance(value, str) or not (value or setting.knob.may_be_empty):
        return f"--{setting.flag} {value!r} is not a non-empty text"
    if value in setting.knob.refused:
        return f"--{setting.flag} {value}: {setting.knob.refused[value]}"
    if setting.knob.choices and value not in setting.knob.choices:
        hint = near(value, setting.knob.choices)
        return f"--{setting.flag} {value!r} is unknown; known: {', '.join(setting.knob.choices)}{hint}"
    return None


def field_problems(config: Any) -> list[str]:
    """Every field whose value alone is wrong."""
    found = (value_problem(setting, getattr(config, setting.name)) for setting in settings(type(config)))
    return [problem for problem in found if problem]


def _parse_number(setting: Setting, text: str) -> Any:
    word = text.strip().lower()
    if setting.knob.infinite and word in (setting.knob.infinite, "inf", "infinity"):
        return math.inf
    if setting.name.endswith("_bytes"):
        for suffix, unit in (("kib", KIB), ("mib", MIB), ("gib", GIB)):
            if word.endswith(suffix):
                word, scale = word.removesuffix(suffix).strip(), unit
                return int(float(word) * scale) if word.replace(".", "", 1).isdigit() and len(word) < 16 else text
    try:
        return int(word, 10) if setting.kind == "int" and len(word) < 32 else float(word)
    except ValueError:
        return text


def parse_value(setting: Setting, value: Any) -> Any:
    """A value from text (or from YAML, already typed) in the field's type.

    What cannot be read comes back as it is, so that the check afterwards names it. Names are case-insensitive and
    take dashes for underscores.
    """
    if setting.many and isinstance(value, (str, list)):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(part.strip() if isinstance(part, str) else part for part in parts)
    if not isinstance(value, str):
        return float(value) if setting.kind == "float" and type(value) is int else value
    if setting.kind in ("int", "float"):
        return _parse_number(setting, value)
    if setting.kind == "bool":
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower(), value)
    if setting.knob.choices:
        word = value.strip().lower().replace("-", "_")
        return setting.knob.spellings.get(word, word)
    return value
