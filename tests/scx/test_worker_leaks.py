"""A planted root key, and what is derived from it, appear in no log, command line or environment of an engine or of
its secure worker; and the key is not in the engine's memory at all, while it is found in the worker's.

The controls plant a leak in each place and must find it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from tests.scx.test_leaks import ROOT, derived, forms, found_in
from tests.scx.workers import end, key_file, start_process

MAY_LOOK = os.geteuid() == 0  # a worker is not dumpable: others of its user cannot read its memory or environment

# An engine with every log on and the nonce that the parent knows, over a worker that adds nothing to it.
CHILD = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
import engine.scx.sessions as sessions
class secrets:
    token_bytes = staticmethod(lambda count: bytes([0x17]) * count)
sessions.secrets = secrets
from engine import LLM, SamplingParams
from engine.scx.open import model_identity
with LLM(sys.argv[1], dtype="float32", kv_pool_bytes=8 << 20, max_num_seqs=2, scx_layers="all", scx_scheme="mix",
         scx_page_seal=True, scx_secure_device=sys.argv[2], scx_debug=True) as llm:
    runner = llm.engine.executor.runner
    llm.generate([[5] * 40], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    secure = runner.scx.scx.secure
    for thing in (runner, runner.scx, runner.scx.scx, secure, secure._link, secure._link.region, secure.config):
        logging.getLogger("engine").debug("%s %r", thing, thing)
    try:
        secure.open(0, bytes([0x17]) * 16)
    except Exception:
        logging.getLogger("engine").exception("as expected")
    print(model_identity(llm.spec).hex())
    print("ready", flush=True)
    sys.stdin.readline()
"""


def memory_has(pid: int, secrets: list[bytes]) -> list[bytes]:
    """The secrets that stand raw in a process's writable memory, where mappings are below 256 MiB."""
    found = []
    with open(f"/proc/{pid}/maps", encoding="ascii") as lines, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in lines:
            span, rights, *_ = line.split()
            first, last = (int(part, 16) for part in span.split("-"))
            if not rights.startswith("rw") or last - first > 1 << 28:
                continue
            try:
                memory.seek(first)
                held = memory.read(last - first)
            except OSError:
                continue
            found += [secret for secret in secrets if secret in held]
    return found


def sockets_of(pid: int) -> bytes:
    """A process's sockets that are not Unix sockets, by inode."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    unix = {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
    inodes = {link[len("socket:["):-1] for link in links if link.startswith("socket:[")}
    assert inodes, "it has a socket"
    return " ".join(inodes - unix).encode()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What both processes wrote, what /proc tells of them while a session is open, and what stands in their memory."""
    folder = tmp_path_factory.mktemp("planted")
    log = folder / "worker.log"
    worker = start_process(str(folder / "socket"), key_file(folder, ROOT), same_nonces=True, log=log,
                           more=("--audit-file", str(folder / "audit")))  # fmt: skip
    command = [sys.executable, "-c", CHILD, str(models.tiny_llama_dir(folder, 31)), f"unix:{folder}/socket"]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert engine.stdout is not None
    found = {}
    try:
        model, ready = engine.stdout.readline(), engine.stdout.readline()
        if ready:
            found["model"] = bytes.fromhex(model.decode())
            found["limits"] = Path(f"/proc/{worker.pid}/limits").read_bytes()
            found["status"] = Path(f"/proc/{worker.pid}/status").read_bytes()
            if MAY_LOOK:
                found["maps"] = Path(f"/proc/{worker.pid}/maps").read_bytes()
                found["sockets"] = sockets_of(worker.pid)
            for name, pid in (("engine", engine.pid), ("worker", worker.pid)):
                found[f"{name} cmdline"] = Path(f"/proc/{pid}/cmdline").read_bytes()
                with contextlib.nullcontext() if MAY_LOOK or name == "engine" else pytest.raises(PermissionError):
                    found[f"{name} environ"] = Path(f"/proc/{pid}/environ").read_bytes()
                    found[f"{name} memory"] = b"".join(memory_has(pid, derived(found["model"])[:2]))
        out, said = engine.communicate(b"\n", timeout=60)
    finally:
        engine.kill()
        end(worker)
    assert ready == b"ready\n", said.decode()[-2000:]
    return {**found, "engine log": out + said, "worker log": log.read_bytes(), "audit": (folder / "audit").read_bytes()}


def test_a_planted_key_leaves_no_trace(told: dict[str, bytes]) -> None:
    """Logs at their most talkative, text forms of what the engine holds, the audit, command lines, environments."""
    assert b"RemoteSecureSide" in told["engine log"] and b"UnknownSession" in told["engine log"]
    assert b"root secret of a file" in told["worker log"] and b"connect" in told["audit"]
    for name, text in told.items():
        if name not in ("model", "worker memory"):
            assert not found_in(text, told["model"]), name


def test_a_worker_is_hardened(told: dict[str, bytes]) -> None:
    """No core dumps or new privileges, no socket but Unix sockets, no library of a server or of weights; the log tells
    what is locked in memory."""
    core = next(line for line in told["limits"].splitlines() if line.startswith(b"Max core file size"))
    assert core.split()[4:6] == [b"0", b"0"] and b"NoNewPrivs:\t1" in told["status"]
    locked_kb = next(int(line.split()[1]) for line in told["status"].splitlines() if line.startswith(b"VmLck"))
    assert (locked_kb > 1000) == (b"all memory locked" in told["worker log"])
    if MAY_LOOK:
        assert told["sockets"] == b""
        assert not any(name in told["maps"] for name in (b"safetensors", b"tokenizers", b"zmq", b"uvloop"))


def test_the_search_finds_planted_leaks(told: dict[str, bytes]) -> None:
    """The control: a key in any of these texts would be found, in any form; the worker's memory does hold the root
    and the open session's key, so that the search of the engine's would have found them."""
    root, session, *_ = derived(told["model"])
    for name in ("engine log", "worker log", "audit", "engine environ", "worker cmdline"):
        half = len(told[name]) // 2
        for secret in (root, session):
            for form in forms(secret):
                assert found_in(told[name][:half] + form + told[name][half:], told["model"]) == [secret]
    if MAY_LOOK:
        assert root in told["worker memory"] and session in told["worker memory"]
