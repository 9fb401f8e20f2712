"""`python -m scripts.scx COMMAND`: what SCX promises, measured.

exactness: the encoded attention layer against the plain one, over dtypes, schemes, schedules, layouts and backends.
worker: what it costs to keep the keys in a process of their own.
"""

from __future__ import annotations

import sys

from scripts import scx_exactness, scx_worker

COMMANDS = {"exactness": scx_exactness.main, "worker": scx_worker.main}


def main() -> int:
    """Run the command named first; the rest of the line is its own."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"{__doc__}\nCOMMAND: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
