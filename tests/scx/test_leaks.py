"""A planted root key and what is derived from it appear in no log, command line or environment of the engine.

A control plants a leak in each of these places and must find it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.scx.keys import Label, Scope, Secret, SessionKeys
from tests import models

ROOT = hashlib.sha256(b"a planted root key").digest()
NONCE = b"\x17" * 16

# The child runs an engine with every log on; sessions take the nonce that the parent knows, so that the parent can
# derive what the child derived. With a control it tells the root itself.
CHILD = """
import logging, os, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
import engine.scx.sessions as sessions
class secrets:
    token_bytes = staticmethod(lambda count: bytes([0x17]) * count)
sessions.secrets = secrets
from engine import LLM, SamplingParams
with LLM(sys.argv[1], dtype="float32", kv_pool_bytes=8 << 20, max_num_seqs=2, scx_layers="all", scx_scheme="mix",
         scx_page_seal=True, scx_key_file=sys.argv[2], scx_debug=True) as llm:
    runner = llm.engine.executor.runner
    llm.generate([[5] * 40], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert list(runner.scx.scx.secure._sessions) == [0], "the request's session ends with the next step"
    for thing in (runner, runner.scx, runner.scx.scx, runner.scx.scx.secure, runner.scx.scx.secure._sessions,
                  runner.scx.scx.config, llm.config):
        logging.getLogger("engine").debug("%s %r", thing, thing)
    try:
        runner.scx.scx.secure.open(0, bytes([0x17]) * 16)
    except Exception:
        logging.getLogger("engine").exception("as expected")
    if "control" in sys.argv:
        print(runner.scx.scx.secure._sessions[0].keys._secret.data, file=sys.stderr)
    print(runner.scx.scx.secure._scope.model.hex())
    print("ready", flush=True)
    sys.stdin.readline()
"""


def forms(secret: bytes) -> list[bytes]:
    """How a secret could be written: raw, as Python shows it, hexadecimal, base64 at each of three alignments."""
    spelled = [secret, repr(secret)[2:-1].encode(), repr(bytearray(secret))[12:-2].encode(), secret.hex().encode(),
               secret.hex().upper().encode(), str(list(secret))[1:-1].encode()]  # fmt: skip
    for skip in range(3):
        whole = base64.b64encode(bytes(skip) + secret)
        spelled.append(whole[(0, 2, 3)[skip] : -4].rstrip(b"="))
    return spelled


def derived(model: bytes) -> list[bytes]:
    """The root, the session's key, and some of its subkeys' first words."""
    keys = SessionKeys(Secret(bytearray(ROOT)), NONCE, Scope(model, "mix"))
    streams = [keys.stream(purpose, Label(layer, head)).words(8).tobytes()
               for purpose in ("qk/left/order1", "v/scales", "row") for layer in (0, 1) for head in (0, 1)]  # fmt: skip
    return [ROOT, bytes(keys._secret.data), *streams]


def run_child(folder: Path, key_file: Path, *more: str, extra: dict[str, str] | None = None) -> dict[str, bytes]:
    """What the child wrote ("log") and what /proc tells of it while it runs; "model" is the model's identity."""
    command = [sys.executable, "-c", CHILD, str(folder), str(key_file), *more]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={**os.environ, **(extra or {})})  # fmt: skip
    assert child.stdout is not None
    model, ready = child.stdout.readline(), child.stdout.readline()
    proc = Path(f"/proc/{child.pid}")
    told = {name: (proc / name).read_bytes() for name in ("cmdline", "environ")} if ready else {}
    out, log = child.communicate(b"\n", timeout=60)
    assert ready == b"ready\n" and child.returncode == 0, log.decode()[-2000:]
    return {**told, "log": out + log, "model": bytes.fromhex(model.decode())}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and the root's file."""
    folder = tmp_path_factory.mktemp("planted")
    key_file = folder / "root"
    key_file.write_text(ROOT.hex())
    key_file.chmod(0o600)
    return models.tiny_llama_dir(folder, 31), key_file


def found_in(told: bytes, model: bytes) -> list[bytes]:
    """The secrets of which some form is in there."""
    return [secret for secret in derived(model) if any(form in told for form in forms(secret))]


def test_a_planted_key_leaves_no_trace(planted: tuple[Path, Path]) -> None:
    """Debug logs, text forms of every object, a logged exception, the command line and the environment."""
    told = run_child(*planted)
    assert b"SCX DEBUG" in told["log"] and b"LocalSecureSide" in told["log"], "nothing was logged; this proves nothing"
    for place in ("log", "cmdline", "environ"):
        assert not found_in(told[place], told["model"]), place


def test_the_search_finds_planted_leaks(planted: tuple[Path, Path]) -> None:
    """The control: the session's key in a log, the root on the command line and in the environment."""
    told = run_child(*planted, "control", base64.b64encode(b"x" + ROOT).decode(), extra={"SOMETHING": ROOT.hex()})
    session = derived(told["model"])[1]
    assert found_in(told["log"], told["model"]) == [session]
    assert found_in(told["cmdline"], told["model"]) == found_in(told["environ"], told["model"]) == [ROOT]
    for form in forms(session):
        assert found_in(b"before" + form + b"after", told["model"]) == [session], form
