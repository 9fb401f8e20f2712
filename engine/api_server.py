"""`python -m engine.api_server`: the server, as `tessera serve`. It only names the command that it is."""

from __future__ import annotations

import sys

from engine.serve.cli import leave, serve

if __name__ == "__main__":
    leave(serve(sys.argv[1:], "python -m engine.api_server"))
