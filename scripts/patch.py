"""Patched vocabularies: `python -m scripts.patch import|inspect|verify|build|apply|train`; docs/vocabularies.md.

Each subcommand is a module of engine/patching with add_arguments(parser) and run(args), imported when it is asked
for. It knows nothing of them but their names.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from engine.core.errors import ConfigError, RequestError

COMMANDS = {
    "import": ("cli_import", "an upstream directory of pickles to an artefact, without unpickling"),
    "inspect": ("cli_inspect", "what an artefact holds"),
    "verify": ("verify", "check an artefact, or this implementation against reference data; measure its speed"),
    "build": ("build", "an artefact from a corpus"),
    "apply": ("apply", "a model's folder for an artefact"),
    "train": ("train", "a light fine-tuning of a patched model"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 2 and one line for what the user can fix."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m scripts.patch", description=__doc__.splitlines()[0])
    choices = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (module, help_text) in COMMANDS.items():
        path = f"engine.patching.{module}"
        if importlib.util.find_spec(path) is None:
            continue
        command = choices.add_parser(name, help=help_text, description=help_text)
        if name in arguments[:1]:
            implementation = importlib.import_module(path)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (ConfigError, RequestError, OSError) as error:
        print(f"{parser.prog} {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
