"""The real server over the fake engine: `python -m tests.serve.fake_server [flags]`; --model is a folder of tests."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.core.errors import ConfigError
from engine.serve import launch
from engine.serve.cli import complain, leave
from engine.serve.flags import parse


def main() -> int:
    """As engine.serve.cli.serve, with another engine command."""
    try:
        found = parse(sys.argv[1:], "fake_server")
        return launch.serve(found, engine_command=(sys.executable, "-m", "tests.serve.fake_engine"),
                            find=lambda asked: Path(asked.engine.model or ""))
    except ConfigError as error:
        for line in str(error).split("\n"):
            complain(line)
        return 2


if __name__ == "__main__":
    leave(main())
