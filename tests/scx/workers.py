"""Secure workers for tests: in a thread, where frames are enough, or as a real process that may be killed.

Both take a root that the test knows; `same_nonces` makes them add nothing to the engine's nonces, so that their maps
are those of a LocalSecureSide with the same root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.parts.rope import rope_table
from engine.runner.batch import Batch, Row, pack
from engine.scx import frames
from engine.scx.audit import Audit
from engine.scx.config import ScxConfig
from engine.scx.keys import Secret
from engine.scx.open import model_identity, open_scx
from engine.scx.remote import RemoteSecureSide, geometry_of
from engine.scx.secure import HeadShape, SecureSide
from engine.scx.secure_worker import DEFAULT_LIMIT_BYTES, Worker, listen
from engine.scx.served import Limits
from scripts.scx_exactness import GROUPS, HEADS, spec_of

DIM, TOKENS, SLOTS = 16, 64, 4
WIDTH = (HEADS + 2 * GROUPS) * DIM
ROOT = bytes(range(32))
CPU = torch.device("cpu")
MAIN = """
import sys
from engine.scx import secure_worker
sys.exit(secure_worker.main(sys.argv[1:], own_nonce=lambda count: b""))
"""


@contextlib.contextmanager
def worker_thread(folder: Path, *, same_nonces: bool = False, audit: str | None = None,
                  limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Iterator[tuple[str, Worker]]:  # fmt: skip
    """(path of its socket, the worker), without the hardening of a process."""
    path = str(folder / f"w{secrets.token_hex(4)}")
    own = (lambda count: b"") if same_nonces else secrets.token_bytes
    worker = Worker(listen(path, others=False), Secret(bytearray(ROOT)), Limits("cpu", limit_bytes), Audit(audit),
                    own_nonce=own)  # fmt: skip
    read, write = os.pipe()
    thread = threading.Thread(target=worker.run, args=(read,), daemon=True)
    thread.start()
    try:
        yield path, worker
    finally:
        os.close(write)
        thread.join(10)
        assert not thread.is_alive(), "the worker did not end"
        os.close(read)
        worker.close()
        worker._listener.close()


def start_process(path: str, key_file: Path | None = None, *, same_nonces: bool = False,
                  log: Path | None = None, more: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:  # fmt: skip
    """A real worker at a path, listening."""
    how = ["-c", MAIN] if same_nonces else ["-m", "engine.scx.secure_worker"]
    keys = [] if key_file is None else ["--key-file", str(key_file)]
    with open(log or os.devnull, "ab") as into:
        process = subprocess.Popen([sys.executable, *how, "--socket", path, *keys, *more], stderr=into)
    for _ in range(1200):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if probe.connect_ex(path) == 0:
                return process
        assert process.poll() is None, "the worker ended"
        time.sleep(0.05)
    raise AssertionError("the worker does not listen")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill and reap."""
    process.kill()
    process.wait()


def key_file(folder: Path, root: bytes = ROOT) -> Path:
    """A root secret's file."""
    path = folder / "root"
    path.write_text(root.hex())
    path.chmod(0o600)
    return path


def config_of(path: str = "cpu", **more: object) -> ScxConfig:
    """Layers 0 and 2 encoded; path: of a worker's socket, or "cpu"."""
    device = path if path == "cpu" else f"unix:{path}"
    return ScxConfig((0, 2), secure_device=device, **more)  # type: ignore[arg-type]


def side_of(config: ScxConfig, dtype: torch.dtype = torch.float32) -> SecureSide:
    """A side of either kind, over the same rotary table and with the same root."""
    rope = rope_table(spec_of(DIM).rope, DIM, TOKENS, TOKENS)
    root = None if config.in_worker else Secret(bytearray(ROOT))
    return open_scx(config, spec_of(DIM), rope, slots=SLOTS, max_tokens=TOKENS, compute=CPU, root=root,
                    dtype=dtype).secure  # fmt: skip


def remote(path: str, **more: object) -> RemoteSecureSide:
    """A connected side."""
    made = side_of(config_of(path, **more))
    assert isinstance(made, RemoteSecureSide)
    return made


def geometry() -> frames.Geometry:
    """What remote() says in its handshake."""
    rope = rope_table(spec_of(DIM).rope, DIM, TOKENS, TOKENS)
    shape = HeadShape(HEADS, GROUPS, DIM, SLOTS, TOKENS)
    return geometry_of(config_of("x"), shape, rope, model_identity(spec_of(DIM)), torch.float32, SLOTS * TOKENS)


def batch_of(*chunks: tuple[int, int, int]) -> Batch:
    """(slot, start, count) of each chunk."""
    return pack([Row(slot, start, [0] * count, True) for slot, start, count in chunks])


def rows_of(batch: Batch, seed: int = 0, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random projections of a batch."""
    return torch.randn(batch.num_tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
