"""From a checked configuration to a secure side, and what the log says about it.

Another kind of secure side is another branch of `open_scx`; nothing else asks where keys live.
"""

from __future__ import annotations

import hashlib
import logging

import torch

from engine.loading.spec import ModelSpec
from engine.scx.attention import Scx
from engine.scx.config import ScxConfig
from engine.scx.environment import DEVICE, LAYERS
from engine.scx.keys import Secret, fresh_root, read_root
from engine.scx.remote import RemoteSecureSide
from engine.scx.schemes import schemes
from engine.scx.secure import HeadShape, LocalSecureSide, SecureSide, indexed
from engine.scx.segments import SegmentBackend, SegmentedSide

log = logging.getLogger(__name__)

# Logged at every start, and the first words of docs/scx.md on what SCX protects: a test compares them.
THREATS = (
    "SCX encoding makes the KV cache of the selected layers unusable and not directly readable to a party that obtains "
    "a snapshot of that cache only (host swap, disk, crash dump, misrouted transfer, another tenant) and lacks the "
    "session key. It is obfuscation, not encryption: with public weights, permutation mode is reversible from a single "
    "snapshot; rotation mode is reversible from norms; every mode is reversible with a known prefix of about head_dim "
    "tokens under one key, or by a party that observes queries, hidden states, scores or logits on the compute device. "
    "Layers not selected are plaintext and are enough to recover the prompt. It gives no integrity, no protection from "
    "a malicious compute node, no protection of lengths, timing, batch composition or sampled tokens. Use a "
    "confidential GPU or another trusted execution environment for protection against the operator; use AES-GCM for KV "
    "at rest outside the device."
)
OF_SCHEME = {
    "perm": "permutation mode is reversible from a single snapshot with public weights: sorting a row undoes it",
    "perm-static": "permutation mode is reversible from a single snapshot with public weights: sorting a row undoes "
                   "it. perm-static moreover has one map for all requests and heads: for comparison only; use perm",
    "rotate": "rotation mode is reversible from norms with public weights: a row's length names its token",
    "mix": "lengths under mix still name some tokens with public weights, and its projection matrix names a prompt",
}  # fmt: skip


def model_identity(spec: ModelSpec) -> bytes:
    """What keys are bound to: a digest of the specification. Checkpoints of one specification share it; their sessions
    differ by their nonces all the same."""
    return hashlib.sha256(repr(spec).encode()).digest()


def open_scx(
    config: ScxConfig, spec: ModelSpec, rope: torch.Tensor, *, slots: int, max_tokens: int, compute: torch.device,
    root: Secret | None = None, dtype: torch.dtype = torch.float32, step_tokens: int | None = None,
) -> Scx:  # fmt: skip
    """An engine's secure side. rope: (P, 2, D/2) float32. root: instead of the configured one, which is a key file's
    or a fresh one. dtype: of encoded rows. step_tokens (rows of the largest step; None: whatever fits) is for a worker.
    Raises ConfigError for a key file that cannot be used, or a worker that cannot be reached."""
    shape = HeadShape(spec.heads, spec.kv_heads, spec.head_dim, slots, max_tokens)
    _say(config, shape, compute)
    side: SecureSide
    if config.in_worker:
        most = min(step_tokens or slots * max_tokens, slots * max_tokens)
        side = RemoteSecureSide(config, shape, rope, model_identity(spec), compute, dtype=dtype, step_tokens=most)
    else:
        if root is None:
            root = fresh_root() if config.key_file is None else read_root(config.key_file)
        make: type[LocalSecureSide] = SegmentedSide if config.segment_tokens else LocalSecureSide
        if make is LocalSecureSide and compute.type == "cuda":
            make = side_of(config, compute, dtype)
        side = make(config, shape, rope, root, model_identity(spec), compute, dtype)
    backend = SegmentBackend(config.segment_tokens, spec.head_dim**-0.5) if config.segment_tokens else None
    return Scx(config, side, backend=backend, wide=schemes[config.scheme].matrices)


def side_of(config: ScxConfig, compute: torch.device, dtype: torch.dtype) -> type[LocalSecureSide]:
    """Which local side answers a GPU. dtype: of encoded rows."""
    from engine.scx.on_device import DeviceSecureSide  # loads Triton
    from engine.scx.on_host import HostSecureSide
    from engine.scx.on_peer import PeerSecureSide, reachable
    from tessera_kernels import host_jobs

    secure = indexed(torch.device(config.secure_device))
    if secure == indexed(compute):
        return DeviceSecureSide
    if secure.type == "cuda":
        return PeerSecureSide if reachable(compute, secure) else LocalSecureSide
    return HostSecureSide if host_jobs.available(dtype) else LocalSecureSide


def _say(config: ScxConfig, shape: HeadShape, compute: torch.device) -> None:
    layers = ",".join(map(str, config.layers))
    log.warning("%s Selected layers: %s; docs/scx.md says more.", THREATS, layers)
    if config.in_worker:
        log.warning("SCX: keys live in a process of their own (%s), on this machine and its kernel: whoever is root "
                    "here reads both", config.secure_device)
    else:
        same = ", and is the compute device" if indexed(torch.device(config.secure_device)) == indexed(compute) else ""
        log.warning("SCX: the secure device %s is in this process%s: no isolation", config.secure_device, same)
    log.warning("SCX scheme %s: %s", config.scheme, OF_SCHEME[config.scheme])
    if config.segment_tokens:
        log.warning("SCX: a key for every %d tokens makes attention run once a key, in plain PyTorch: slow",
                    config.segment_tokens)
        if config.segment_tokens >= shape.head_dim:
            log.warning("SCX: %d tokens a key are no fewer than the %d entries of a head: known text of that length "
                        "undoes it", config.segment_tokens, shape.head_dim)
    if config.debug:  # asked for, so as warnings: a program without a logging configuration shows these
        log.warning("[SCX DEBUG] %s: %s", LAYERS, layers)
        log.warning("[SCX DEBUG] %s: %s", DEVICE, config.secure_device)
        log.warning("[SCX DEBUG] scheme %s, %d heads over %d KV heads of %d, %d slots, sealed blocks of %d tokens",
                    config.scheme, shape.heads, shape.kv_heads, shape.head_dim, shape.slots, config.seal_tokens)
