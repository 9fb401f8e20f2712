"""`python -m scripts.scx COMMAND`: what SCX promises, and what it does not, measured; docs/scx.md.

Each command is a module with main(arguments), imported when it is asked for. It knows nothing of them but their names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from engine.core.errors import ConfigError

COMMANDS = {
    "accuracy": ("scripts.scx_accuracy", "perplexity and a cloze task, plain against each scheme"),
    "example": ("scripts.scx_example", "a plain and an encoded engine give the same answers"),
    "exactness": ("scripts.scx_exactness", "encoded attention against plain, over dtypes, schemes and schedules"),
    "leakage": ("scripts.scx_attacks.cli", "what attackers recover from encoded keys and values, by scheme"),
    "lm-eval": ("scripts.scx_lm_eval", "lm-eval's tasks on the engine, plain or encoded"),
    "overhead": ("scripts.scx_overhead", "milliseconds a step with and without encoded layers, in turns"),
    "worker": ("scripts.scx_worker", "the same with keys in a process of their own; stages, bytes and calls"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named first; the rest of the line is its own. 2 when there is no such command, and with one line
    for what the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
        print(f"python -m scripts.scx COMMAND; --help behind it tells its flags\n{known}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        return int(module.main(arguments[1:]))
    except ConfigError as error:
        print(f"python -m scripts.scx {arguments[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
