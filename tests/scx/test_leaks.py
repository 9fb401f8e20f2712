"""A planted root key and what is derived from it, maps included, appear in no log, command line or environment.

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

from engine.scx.keys import Label, Scope, Secret, SessionKeys, permutations
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
with LLM(sys.argv[1], dtype="float32", kv_pool_bytes=8 << 20, max_num_seqs=2, scx_layers="all", scx_scheme=sys.argv[3],
         scx_segment_tokens=int(sys.argv[4]) or None, scx_page_seal=True, scx_key_file=sys.argv[2],
         scx_debug=True) as llm:
    runner = llm.engine.executor.runner
    llm.generate([[5] * 40], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert list(runner.scx.scx.secure._sessions) == [0], "the request's session ends with the next step"
    secure = runner.scx.scx.secure
    session = secure._sessions[0]
    assert len(session.segments) == (0 if not secure.config.segment_tokens else 3)
    for thing in (runner, runner.scx, runner.scx.scx, secure, secure._sessions, session, secure._tables,
                  session.segments, runner.scx.scx.config, llm.config):
        logging.getLogger("engine").debug("%s %r", thing, thing)
    try:
        runner.scx.scx.secure.open(0, bytes([0x17]) * 16)
    except Exception:
        logging.getLogger("engine").exception("as expected")
    if "control" in sys.argv:
        print(session.keys._secret.data, file=sys.stderr)
        if session.segments:
            print(*map(tuple, session.segments), file=sys.stderr)
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


def orders(model: bytes, segments: int) -> list[bytes]:
    """The first entries of permutations of `perm` with segments, as text without blanks shows them."""
    keys = SessionKeys(Secret(bytearray(ROOT)), NONCE, Scope(model, "perm"))
    shape = [Label(layer, head, segment) for layer in (0, 1) for head in (0, 1) for segment in range(segments)]
    drawn = [order for purpose in ("qk", "v") for order in permutations(keys, purpose, shape, 16)]
    return [",".join(map(str, order[:8].tolist())).encode() for order in drawn]


def orders_in(told: bytes, model: bytes, segments: int = 3) -> int:
    """How many of the permutations' texts are in there."""
    bare = b"".join(told.split())
    return sum(order in bare for order in orders(model, segments))


def run_child(
    folder: Path, key_file: Path, *more: str, extra: dict[str, str] | None = None, scheme: str = "mix",
    segments: int = 0,
) -> dict[str, bytes]:  # fmt: skip
    """What the child wrote ("log") and what /proc tells of it while it runs; "model" is the model's identity."""
    command = [sys.executable, "-c", CHILD, str(folder), str(key_file), scheme, str(segments), *more]
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


def test_maps_of_segments_leave_no_trace(planted: tuple[Path, Path]) -> None:
    """The permutations of every segment, in no text form of the sessions that hold them; the control prints them."""
    told = run_child(*planted, scheme="perm", segments=16)
    assert b"LocalSecureSide" in told["log"] or b"SegmentedSide" in told["log"]
    assert not orders_in(told["log"], told["model"])
    leaky = run_child(*planted, "control", scheme="perm", segments=16)
    assert orders_in(leaky["log"], leaky["model"]) == len(orders(leaky["model"], 3))
