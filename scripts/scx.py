"""SCX, measured: `python -m scripts.scx leakage`; docs/scx.md.

Each subcommand is a module with add_arguments(parser) and run(args), imported when it is asked for. It knows nothing
of them but their names.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from engine.core.errors import ConfigError

COMMANDS = {
    "leakage": ("scripts.scx_attacks.cli", "what attackers recover from encoded keys and values, scheme by scheme"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 2 and one line for what the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m scripts.scx", description=__doc__.splitlines()[0])
    choices = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (module, help_text) in COMMANDS.items():
        command = choices.add_parser(name, help=help_text, description=help_text)
        if name in arguments[:1]:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except ConfigError as error:
        print(f"{parser.prog} {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
