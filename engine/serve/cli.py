"""The console command `tessera`: a word, then that word's flags. `tessera serve` is `python -m engine.api_server`.

It knows words, not what they do. Mistakes end with exit status 2 and one line each, never with a traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import engine
from engine.core.errors import ConfigError
from engine.core.knobs import near

Command = Callable[[Sequence[str], str], int]


def serve(argv: Sequence[str], prog: str = "tessera serve") -> int:
    """Serve a model over HTTP. Returns the exit status; 2 with one line each for whatever is wrong with the flags."""
    from engine.serve.flags import parse

    try:
        launch = parse(argv, prog)
        from engine.serve import launch as launcher

        return launcher.serve(launch)
    except ConfigError as error:
        for line in str(error).split("\n"):
            complain(line)
        return 2
    except KeyboardInterrupt:
        return 130


def bench(argv: Sequence[str], prog: str = "tessera bench") -> int:
    """The benchmarks of the checkout that this package lies in. Returns their exit status; 2 where there is none."""
    root = Path(engine.__file__).resolve().parent.parent
    if not (root / "scripts" / "bench.py").is_file():
        complain(f"{prog} needs a checkout: the benchmarks are not in the wheel; get the sources, and in their folder "
                 "run: python -m scripts.bench")
        return 2
    return subprocess.run([sys.executable, "-c", RUN_BENCH, str(root), *argv], check=False).returncode


# In a process of its own, and found by the folder: another package named scripts may be on the path before it.
RUN_BENCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from scripts.bench import main; raise SystemExit(main())"
)
COMMANDS: dict[str, tuple[Command, str]] = {
    "serve": (serve, "serve a model over HTTP with OpenAI's routes"),
    "bench": (bench, "measure this machine and this engine (in a checkout)"),
}


def complain(line: str) -> None:
    """One line on standard error."""
    try:
        print(f"error: {line}", file=sys.stderr, flush=True)
    except OSError:
        pass


def usage() -> str:
    """What there is to say."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "usage: tessera COMMAND [flags]\n\ncommands:\n" + "\n".join(lines) + "\n\ntessera COMMAND --help says more."


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that argv names. Returns its exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"tessera {engine.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        complain(f"command {argv[0]!r} is unknown{near(argv[0], list(COMMANDS))}; known: {', '.join(COMMANDS)}")
        return 2
    return COMMANDS[argv[0]][0](argv[1:], f"tessera {argv[0]}")


def leave(status: int) -> None:
    """End the process with this status even if standard output can take no more (a full disk makes Python end 120)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os._exit(status)
    raise SystemExit(status)


def main() -> None:
    """Entry of the console command."""
    leave(dispatch(sys.argv[1:]))
