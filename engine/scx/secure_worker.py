"""`python -m engine.scx.secure_worker --socket PATH`: the secure side as a process of its own.

It holds the root secret, the rotary table and one engine's sessions, answers for the rows of its schedule
(engine/scx/served.py), and opens nothing but a Unix socket. It loads no weights and no server. Who connects must be
of its own user, or of the one that --allow-uid names; when that connection ends, its sessions are cleared.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import secrets
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence

import torch

from engine.core.clock import MonotonicClock
from engine.core.errors import ConfigError
from engine.scx import frames
from engine.scx.audit import Audit
from engine.scx.config import known_devices
from engine.scx.errors import ScxError, WorkerRefused
from engine.scx.keys import Secret, fresh_root, read_root
from engine.scx.served import Limits, Served
from tessera_kernels import native

log = logging.getLogger("engine.scx.secure_worker")  # also when it runs as __main__

BEAT_S = 0.5
HANDSHAKE_S = 10.0  # for a connection that says nothing while another could
BACKLOG = 8
DEFAULT_LIMIT_BYTES = 8 << 30
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
CAP_IPC_LOCK = 14


def harden() -> bool:
    """No core dump, no debugger of the same user, no new privileges. Returns whether all memory, also what comes later,
    is locked against swapping; that is left out where a limit would make later allocations fail."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for option, value in ((PR_SET_DUMPABLE, 0), (PR_SET_NO_NEW_PRIVS, 1)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
    with open("/proc/self/status", encoding="ascii") as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    permitted = unlimited or bool(effective >> CAP_IPC_LOCK & 1)
    return permitted and libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0


def lock(root: Secret) -> bool:
    """Lock the root secret alone against swapping. Returns whether the system permitted it."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(root.data))
    return bool(ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(root.data))) == 0)


def listen(path: str, *, others: bool) -> socket.socket:
    """The listening socket, mode 0600 (0666 where another user may connect: peers are checked one by one).

    Raises ConfigError when a worker answers there already, or the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o111 if others else 0o177)
    try:
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                if probe.connect_ex(path) == 0:
                    raise ConfigError(f"--socket {path}: a worker answers there already; use another path or end it")
            os.unlink(path)  # what a killed worker left
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--socket {path}: {error.strerror or error}; use a path of at most 107 bytes in a "
                          "directory of your own") from None
    except ConfigError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of who connected, from the kernel."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class Worker:
    """One listener, at most one engine. run() serves until the lifeline ends; the rest is for tests to look at.

    own_nonce: what the worker adds to the engine's nonce of a session, so that no engine can ask for a key again.
    """

    def __init__(
        self, listener: socket.socket, root: Secret, limits: Limits, audit: Audit, *, allow_uid: int | None = None,
        own_nonce: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:  # fmt: skip
        self._listener, self._root, self._limits, self._audit = listener, root, limits, audit
        self._uids = {os.geteuid()} if allow_uid is None else {os.geteuid(), allow_uid}
        self._own_nonce, self._clock = own_nonce, MonotonicClock()
        self._connection: socket.socket | None = None
        self._served: Served | None = None
        self._since_s = 0.0

    def run(self, lifeline: int | None = None) -> None:
        """Serve. lifeline: a descriptor whose end of file ends the worker."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        if lifeline is not None:
            poller.register(lifeline, select.POLLIN)
        while True:
            connection = self._connection
            if connection is not None:
                poller.register(connection, select.POLLIN)
            waits = self._served is not None and not self._served.ready
            ready = {descriptor for descriptor, _ in poller.poll(1000 if waits else None)}
            if connection is not None:
                poller.unregister(connection)
                if connection.fileno() in ready:
                    self._receive()
            if lifeline in ready and not os.read(lifeline, 4096):  # type: ignore[arg-type]
                return
            late = self._clock.now_s() - self._since_s > HANDSHAKE_S
            if self._served is not None and not self._served.ready and late:
                self._hang_up("it did not finish the handshake")
            if self._listener.fileno() in ready:
                self._accept()

    def close(self) -> None:
        """Clear every session and the root."""
        self._hang_up("the worker ends")
        self._root.clear()

    def _beat(self) -> None:
        """Show that this process runs, as long as it does."""
        pause = threading.Event()
        count = 0
        while not pause.wait(BEAT_S):
            count += 1
            served = self._served
            if served is not None and served.region is not None:
                served.region.beat(count)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        pid, uid = peer_of(connection)
        connection.setblocking(False)
        if uid not in self._uids:
            refusal = f"user {uid} may not connect; start the worker with --allow-uid {uid}"
        elif self._connection is not None:
            refusal = "another engine is connected; a worker serves one"
        else:
            self._connection, self._since_s = connection, self._clock.now_s()
            root = Secret(bytearray(self._root.data))
            self._served = Served(root, self._limits, self._own_nonce)
            log.info("process %d of user %d connected", pid, uid)
            self._audit.note("connect", uid=uid)
            return
        log.warning("process %d refused: %s", pid, refusal)
        self._audit.note("refuse", uid=uid)
        self._send(connection, frames.Refused(WorkerRefused.__name__, refusal))
        connection.close()

    def _receive(self) -> None:
        """Read one frame, answer it. What goes wrong ends this connection at most."""
        assert self._connection is not None and self._served is not None
        try:
            raw, _, flags, _ = self._connection.recvmsg(frames.MAX_FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError:
            raw, flags = b"", 0
        if not raw:
            self._hang_up("it closed the connection")
            return
        try:
            if flags & socket.MSG_TRUNC:
                raise WorkerRefused(f"a frame above {frames.MAX_FRAME_BYTES} bytes")
            answer = self._served.answer(raw)
            descriptor = self._served.take_descriptor()
            if answer is not None and not self._send(self._connection, answer, descriptor):
                self._hang_up("it does not read")
        except ScxError as error:
            kind = type(error).__name__
            self._audit.note("deny", kind=kind)
            self._send(self._connection, frames.Refused(kind, str(error)[:1024]))
            if isinstance(error, WorkerRefused):
                self._hang_up(str(error))
        except Exception as error:  # an engine's doing or our bug: its sessions end, the worker goes on
            log.error("a frame was not answered: %s", type(error).__name__)
            refusal = frames.Refused(WorkerRefused.__name__, f"a fault in the worker ({type(error).__name__})")
            self._send(self._connection, refusal)
            self._hang_up("a fault")

    def _send(self, connection: socket.socket, answer: frames.FromWorker, descriptor: int | None = None) -> bool:
        """False when the peer does not take it: the worker waits for nobody."""
        try:
            if descriptor is None:
                connection.send(frames.encode(answer))
            else:
                socket.send_fds(connection, [frames.encode(answer)], [descriptor])
        except OSError:
            return False
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return True

    def _hang_up(self, why: str) -> None:
        """End the connection and clear its sessions. Idempotent."""
        if self._connection is None or self._served is None:
            return
        served, self._served = self._served, None
        counts = served.counts
        served.close()
        self._connection.close()
        self._connection = None
        log.info("disconnected (%s): %s", why, ", ".join(f"{name} {count}" for name, count in counts.items()))
        self._audit.note("disconnect", **counts)


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, which never holds a key."""
    parser = argparse.ArgumentParser(prog="python -m engine.scx.secure_worker", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the Unix socket to make")
    parser.add_argument("--key-file", help="root secret: 64 hexadecimal digits, mode 0600 (default: a fresh one)")
    parser.add_argument("--allow-uid", type=int, help="user id that may connect, beside the worker's own")
    parser.add_argument("--device", default="cpu", help="where maps are kept and applied: cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=1, help="threads of the kernels")
    parser.add_argument("--limit-bytes", type=int, default=DEFAULT_LIMIT_BYTES, help="most bytes of maps and table")
    parser.add_argument("--audit-file", help="append what happens (counts only), each line chained to the one before")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input closes (started by an engine)")
    return parser.parse_args(argv)


def set_threads(count: int) -> None:
    """Threads of the kernels here. More than one spin between an engine's calls, on cores that the engine may need."""
    torch.set_num_threads(count)
    native.set_threads(count)


def serve(options: argparse.Namespace, own_nonce: Callable[[int], bytes]) -> None:
    """From options to the end of the process's work. Raises ConfigError for what the user can fix."""
    if options.device not in known_devices():
        raise ConfigError(f"--device {options.device} is not a device here; use {' or '.join(known_devices())}")
    all_locked = harden()
    root = fresh_root() if options.key_file is None else read_root(options.key_file)
    locked = "all memory" if all_locked else "only the root secret" if lock(root) else "nothing"
    set_threads(max(1, options.threads))
    audit = Audit(options.audit_file)
    listener = listen(options.socket, others=options.allow_uid is not None)
    limits = Limits(options.device, options.limit_bytes)
    worker = Worker(listener, root, limits, audit, allow_uid=options.allow_uid, own_nonce=own_nonce)
    log.info("secure worker %d at %s: root secret %s; no core dumps, not dumpable, %s locked in memory", os.getpid(),
             options.socket, "fresh" if options.key_file is None else "of a file", locked)
    if not all_locked:
        log.warning("session keys and maps may be swapped to disk; raise `ulimit -l` or turn swap off")
    audit.note("start")
    try:
        worker.run(0 if options.lifeline else None)
    finally:
        worker.close()
        audit.note("end")
        with contextlib.suppress(OSError):
            os.unlink(options.socket)
            if options.lifeline:  # the engine's folder for it: nobody else may be left to remove it
                os.rmdir(os.path.dirname(options.socket))


def main(argv: Sequence[str] | None = None, own_nonce: Callable[[int], bytes] = secrets.token_bytes) -> int:
    """The process. Returns its exit status: 0 told to end, 2 the user can fix it."""
    options = options_of(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, level="INFO", format="%(levelname)s %(name)s: %(message)s", force=True)
    if options.lifeline:  # a terminal's Ctrl-C reaches the group; the engine ends first, and then its pipe
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as Ctrl-C
    try:
        serve(options, own_nonce)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # keys are cleared; a slow interpreter teardown would only delay the exit
