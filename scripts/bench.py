"""Benchmarks that a stranger can run: `python -m scripts.bench COMMAND --help`.

A table of words; what each does is in scripts/benching/COMMAND.py. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "throughput": "offline: output and total tokens a second, alone or beside a peer",
    "latency": "one request alone: first token, between tokens",
    "serve": "online arrivals: TTFT, TBT, goodput; in this process or over HTTP",
    "scx": "throughput of plain and encoded layers over prompt and output lengths",
    "prompts": "texts of an exact number of tokens, for other programs",
    "startup": "seconds from the command to ready",
    "attention": "each attention backend: bytes and operations a second",
    "mapping": "the allocator: cost of a page, stall of a step, with and without look-ahead",
    "compare": "two reports: ratios, noise, regressions",
}


def usage() -> str:
    """What there is to say."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "usage: python -m scripts.bench COMMAND [flags]\n\ncommands:\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named first. Returns its exit status; 2 and one line each for what the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        asked = bool(words) and words[0] in ("-h", "--help", "help")
        print(usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from engine.core.errors import ConfigError
    from scripts.benching.drive import NotProduced

    module = importlib.import_module(f"scripts.benching.{words[0]}")
    parser = argparse.ArgumentParser(prog=f"scripts.bench {words[0]}", description=module.__doc__, allow_abbrev=False)
    module.add_flags(parser)
    args, rest = parser.parse_known_args(words[1:])
    args.command, args.argv = words[0], words[1:]
    try:
        if getattr(args, "runs", 1) < 1:
            raise ValueError(f"--runs {args.runs} must be at least 1")
        return int(module.run(args, rest))
    except (ConfigError, NotProduced, ValueError) as error:
        for line in str(error).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
