"""`python -m scripts.flags`: write docs/flags.md from the typed settings of engine/core/config.py.

It reads field names, types, ranges, aliases and help; a test fails when the page is not what it would write.
"""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

from engine.core.config import REFUSED_SETTINGS, EngineConfig, ServerConfig
from engine.core.knobs import Setting, settings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
TITLES = {
    "model": "Model", "scheduler": "Scheduler", "memory": "Memory", "engine": "Engine", "server": "Server",
    "access": "Access", "scx": "SCX",
}  # fmt: skip
HEAD = """# Flags

Written by `python -m scripts.flags` from `engine/core/config.py`; change that file instead.

The same names work as flags of `python -m engine.api_server` and `tessera serve`, as keys of `--config FILE.yaml`, and
(those of the engine) as keywords of `engine.LLM`. Dashes and underscores are the same. A flag wins over the file.
A value that cannot be honoured is refused at start with the reason (exit status 2), never ignored.
"""


def cell(text: str) -> str:
    """Text that a Markdown table can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def default_of(setting: Setting) -> str:
    """The default as a reader wants it."""
    if setting.knob.default_text:
        return cell(setting.knob.default_text)
    if setting.default == math.inf:
        return f"`{setting.knob.infinite}`"
    return f"`{str(setting.default).lower() if isinstance(setting.default, bool) else setting.default}`"


def values_of(setting: Setting) -> str:
    """Accepted values: choices or a range."""
    if setting.knob.choices:
        return ", ".join(f"`{choice}`" for choice in setting.knob.choices)
    if setting.kind in ("int", "float"):
        high = "" if setting.knob.hi is None else f"{setting.knob.hi:,}"
        words = f"{setting.knob.lo:,} to {high}" + (f", or `{setting.knob.infinite}`" if setting.knob.infinite else "")
        return words
    return {"bool": "`true`, `false`"}.get(setting.kind, "names" if setting.many else "text")


def render() -> str:
    """The whole page."""
    every = sorted((*settings(EngineConfig), *settings(ServerConfig)), key=lambda s: [*TITLES].index(s.knob.group))
    parts = [HEAD]
    refused = []
    for group, members in groupby(every, key=lambda setting: setting.knob.group):
        parts.append(f"\n## {TITLES[group]}\n\n| flag | values | default | what it does |\n|---|---|---|---|\n")
        for setting in members:
            also = "".join(f"<br>`--{name}`" for name in setting.knob.aliases)
            row = (f"`--{setting.flag}`{also}", values_of(setting), default_of(setting), cell(setting.knob.help))
            parts.append(f"| {' | '.join(row)} |\n")
            refused += [(f"`--{setting.flag} {value}`", reason) for value, reason in setting.knob.refused.items()]
    refused += [(f"`--{name.replace('_', '-')}`", reason) for name, reason in REFUSED_SETTINGS.items()]
    parts.append("\n## Refused\n\nKnown elsewhere, refused here, with the reason that the error gives.\n\n")
    parts.append("| what | why, and what to use |\n|---|---|\n")
    parts += [f"| {what} | {cell(reason)} |\n" for what, reason in refused]
    return "".join(parts)


def main() -> int:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
