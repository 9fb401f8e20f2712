"""Is an encoded layer's output the plain layer's? Every dtype, scheme, schedule, layout and attention backend.

    python -m scripts.scx exactness [--only TEXT ...] [--head-dim 64] [--roots 25] [--device cuda] [--secure-device cpu]

Three sequences of random projections go through one encoded attention layer and one plain one, in the same steps over
slabs of the same strides; both are compared with float64 on the unrounded projections. A case passes when, in float32,
the relative L2 distance from the plain layer is at most 5e-6; in 16 bits, permutations stay within 5e-4 and 2 units in
the last place of a row's largest entry, rotations have at most 1.25 and mixes 1.5 times the plain layer's error. No
cached row may equal its plaintext. One line a case and root; the last line is JSON, with the least, the median and the
largest error over roots; the exit status is 1 when a case fails. Encoded layers of matrices get projections in float32,
as in an engine: the one rounding is the encoded rows' (docs/scx.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.attention.base import backends
from engine.attention.choose import why_not
from engine.loading.spec import ModelSpec, RopeSpec
from engine.parts.kernel_set import kernel_sets
from engine.parts.layer import Attention, AttentionPiece
from engine.parts.rope import rope_table
from engine.runner.batch import Row, pack
from engine.scx.attention import ScxAttention
from engine.scx.config import ScxConfig
from engine.scx.keys import Secret
from engine.scx.open import open_scx

HEADS, GROUPS, LAYERS, LAYER, TOKENS = 8, 2, 3, 1, 128
LENGTHS = (90, 33, 61)  # of the three sequences
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}
SCHEMES = ("perm-static", "perm", "rotate", "mix")
SCHEDULES = ("whole", "chunks of 1", "chunks of 7", "chunks of 64", "hybrid", "preempt and resume")
LAYOUTS = ("mega", "per_layer")
# attention backends of a device, with the kernel set that stores the plain layer's rows
BACKENDS = {
    "cpu": {"torch_vattn": "torch", "cpu_vattn": "cpu"},
    "cuda": {"triton_vattn": "cuda", "fa_vattn": "cuda", "fi_vattn": "cuda"},
}
EXTRAS = ("", "sealed", "segments", "sealed segments")
LIMITS = {"float32": 5e-6, "perm": 5e-4, "rotate": 1.25, "mix": 1.5}

Work = tuple[int, int, int, int]  # sequence, slot, start, count


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    dtype: str
    scheme: str
    schedule: str
    layout: str
    backend: str
    extra: str = ""

    def __str__(self) -> str:
        parts = (self.dtype, self.scheme, self.schedule, self.layout, self.backend, self.extra)
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Verdict:
    """What a case gave. distance: relative L2 from the plain layer; ulps: largest difference in units in the last place
    of the row's largest entry; ratio: error over the plain layer's error; same_rows: cached rows equal to plaintext."""

    distance: float
    ulps: float
    ratio: float
    same_rows: int
    passed: bool


def spec_of(head_dim: int) -> ModelSpec:
    """A specification of which only the attention's sizes matter."""
    return ModelSpec(
        architecture="LlamaForCausalLM", layers=LAYERS, hidden=HEADS * head_dim, heads=HEADS, kv_heads=GROUPS,
        head_dim=head_dim, ffn=64, vocab=64, eps=1e-5, rope=RopeSpec(), tie=True, dtype="float32",
        max_positions=TOKENS, eos_ids=(),
    )  # fmt: skip


def schedule(name: str) -> list[list[Work]]:
    """The steps of a schedule: in each, chunks of different sequences. Slots are the sequences' own, but for a resumed
    one, which gets another."""
    if name == "hybrid":  # one decodes while another's prompt runs in chunks, a third joins late
        steps: list[list[Work]] = [[(1, 1, 0, 20)]]
        for i in range(13):
            steps.append([(0, 0, 7 * i, 7 if i < 12 else 6), (1, 1, 20 + i, 1)])
        return [*steps, [(2, 2, 0, 60)], [(2, 2, 60, 1)]]
    if name == "preempt and resume":
        first: list[list[Work]] = [[(0, 0, 0, 40), (1, 1, 0, 33)], [(0, 0, 40, 17), (2, 2, 0, 30)]]
        return [*first, [(2, 2, 30, 31)], [(0, 3, 0, 64)], [(0, 3, 64, 26)]]
    chunk = {"whole": TOKENS, "chunks of 1": 1, "chunks of 7": 7, "chunks of 64": 64}[name]
    steps = []
    for start in range(0, max(LENGTHS), chunk):
        rows = [(i, i, start, min(chunk, length - start)) for i, length in enumerate(LENGTHS) if start < length]
        steps.append(rows)
    return steps


def slabs(layout: str, dtype: torch.dtype, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed K and V views (S, C, G, D) with a layout's strides."""
    if layout == "mega":
        both = torch.zeros(2, 4, TOKENS, LAYERS, GROUPS, head_dim, dtype=dtype, device=device)[:, :, :, LAYER]
    else:
        both = torch.zeros(2, 4, TOKENS, GROUPS, head_dim, dtype=dtype, device=device)
    return both[0], both[1]


class Same:
    """A projection that changes nothing: the case is about what stands between projections."""

    def __call__(self, x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """x: (N, C). See Linear."""
        return x if add_to is None else add_to.copy_(x)


def inputs(head_dim: int) -> list[torch.Tensor]:
    """Projected rows of each sequence before they are rounded, (length, (H + 2G) * D) float32."""
    width = (HEADS + 2 * GROUPS) * head_dim
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=generator) for length in LENGTHS]


def truth(rows: Sequence[torch.Tensor], spec: ModelSpec) -> list[torch.Tensor]:
    """Attention outputs of whole sequences in float64, (length, H * D)."""
    from tessera_kernels.rope_store import rotate_reference

    rope = rope_table(spec.rope, spec.head_dim, TOKENS, TOKENS).double()
    found = []
    for row in rows:
        count = row.shape[0]
        x = row.double().view(count, HEADS + 2 * GROUPS, spec.head_dim)
        rotated = rotate_reference(x[:, : HEADS + GROUPS], rope[:count, None, 0], rope[:count, None, 1], False)
        q, k = rotated[:, :HEADS].transpose(0, 1), rotated[:, HEADS:].transpose(0, 1)
        v = x[:, HEADS + GROUPS :].transpose(0, 1)
        k, v = (side.repeat_interleave(HEADS // GROUPS, dim=0) for side in (k, v))
        scores = q @ k.mT * spec.head_dim**-0.5
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        found.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1).flatten(1))
    return found


@dataclass
class Bench:
    """One layer with its slabs. `ran` keeps every computed output row by (sequence, position)."""

    piece: AttentionPiece
    k: torch.Tensor
    v: torch.Tensor
    head_dim: int

    def run(self, rows: Sequence[torch.Tensor], steps: Sequence[Sequence[Work]], secure: object) -> list[torch.Tensor]:
        """Each sequence's outputs, (length, H * D); a session is opened (and the slot's last one closed) at start 0."""
        dtype = self.k.dtype
        out = [torch.full((row.shape[0], HEADS * self.head_dim), float("nan"), dtype=dtype) for row in rows]
        for step in steps:
            for sequence, slot, start, _ in step:
                if start == 0 and secure is not None:
                    secure.close(slot)  # type: ignore[attr-defined]
                    secure.open(slot, bytes([slot, sequence]) * 8)  # type: ignore[attr-defined]
            batch = pack([Row(slot, start, [0] * count, True) for _, slot, start, count in step]).to(self.k.device)
            x = torch.cat([rows[sequence][start : start + count] for sequence, _, start, count in step])
            done = torch.empty((x.shape[0], HEADS * self.head_dim), dtype=dtype, device=self.k.device)
            self.piece(x.to(self.k.device), batch, done)
            parts = done.cpu().split([work[3] for work in step])
            for (sequence, _, start, count), part in zip(step, parts, strict=True):
                out[sequence][start : start + count] = part
        return out


def run_case(
    case: Case, head_dim: int = 64, device: str = "cpu", secure_device: str = "cpu", root: int = 0
) -> Verdict:
    """Run both layers and judge. root: number of the root secret; each gives other maps, the same in every run."""
    dtype, spec = DTYPES[case.dtype], spec_of(head_dim)
    exact, steps = inputs(head_dim), schedule(case.schedule)
    rows = [row.to(dtype) for row in exact]
    rope = rope_table(spec.rope, head_dim, TOKENS, TOKENS)
    backend, kernels = backends[case.backend](spec), kernel_sets[BACKENDS[device][case.backend]]()
    k, v = slabs(case.layout, dtype, head_dim, device)
    plain = Bench(Attention(kernels, backend, Same(), Same(), rope.to(device), k, v, HEADS, 0), k, v, head_dim)
    seal = 8 if "sealed" in case.extra else 0
    segment = 16 if "segments" in case.extra else 0
    config = ScxConfig((LAYER,), secure_device, case.scheme, seal_tokens=seal, segment_tokens=segment)
    scx = open_scx(config, spec, rope, slots=4, max_tokens=TOKENS, compute=torch.device(device), dtype=dtype,
                   root=Secret(bytearray(range(root, root + 32))))  # fmt: skip
    k, v = slabs(case.layout, dtype, head_dim, device)
    piece = ScxAttention(LAYER, scx, scx.backend or backend, Same(), Same(), k, v, 0)
    encoded = Bench(piece, k, v, head_dim)
    with torch.inference_mode():
        wanted, got = plain.run(rows, steps, None), encoded.run(exact if scx.wide else rows, steps, scx.secure)
        return judge(case, wanted, got, truth(exact, spec), same_rows(plain, encoded))


def same_rows(plain: Bench, encoded: Bench) -> int:
    """Cached rows (slot, token, KV head) of the encoded layer that are, in place, the plain layer's."""
    count = 0
    for theirs, ours in ((plain.k, encoded.k), (plain.v, encoded.v)):
        written = (theirs != 0).any(dim=-1)
        count += int(((theirs == ours).all(dim=-1) & written).sum())
    return count


def judge(
    case: Case, wanted: list[torch.Tensor], got: list[torch.Tensor], exact: list[torch.Tensor], same: int
) -> Verdict:
    """Distances over all rows of all sequences, and whether they are within the case's limits."""
    plain, ours, true = (torch.cat(side).double() for side in (wanted, got, exact))
    distance = float((ours - plain).norm() / plain.norm())
    # of the largest power of two in the row
    unit = 2.0 ** (plain.abs().amax(dim=-1, keepdim=True).log2().floor() - MANTISSA_BITS[case.dtype])
    ulps = float(((ours - plain).abs() / unit).max())
    ratio = float((ours - true).norm() / (plain - true).norm())
    if case.dtype == "float32":
        within = distance <= LIMITS["float32"]
    elif case.scheme.startswith("perm") and "segments" not in case.extra:
        within = distance <= LIMITS["perm"] and ulps <= 2
    else:
        within = ratio <= LIMITS["mix" if case.scheme == "mix" else "rotate"]
    return Verdict(distance, ulps, ratio, same, within and same == 0)


def cases(device: str = "cpu") -> Iterator[Case]:
    """The whole matrix. Segments have attention of their own, so there one backend is enough."""
    fitting = {
        dtype: [name for name in BACKENDS[device] if not why_not(name, device, dtype, 64)] for dtype in DTYPES
    }
    for dtype in DTYPES:
        for extra in EXTRAS:
            for scheme in SCHEMES:
                if "segments" in extra and scheme == "perm-static":
                    continue  # it has one key by definition; the configuration refuses it
                for name in SCHEDULES:
                    for layout in LAYOUTS:
                        for backend in fitting[dtype][: 1 if "segments" in extra else None]:
                            yield Case(dtype, scheme, name, layout, backend, extra)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The least, the median and the largest."""
    return min(values), statistics.median(values), max(values)


def main(argv: Sequence[str]) -> int:
    """Print the matrix."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scx exactness", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="texts that a case's line must contain")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--roots", type=int, default=1, help="root secrets (1..200) to run every case with")
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cpu", help="the compute device")
    parser.add_argument("--secure-device", default="cpu")
    options = parser.parse_args(argv)
    logging.getLogger("engine").setLevel(logging.ERROR)  # one statement of threats a case is too many
    torch.set_num_threads(1)  # the tensors are tiny
    failed: list[str] = []
    worst: dict[str, Verdict] = {}
    ratios: dict[str, list[float]] = {}
    count = 0
    for case in cases(options.device):
        if not all(text in str(case) for text in options.only):
            continue
        for root in range(options.roots):
            found = run_case(case, options.head_dim, options.device, options.secure_device, root)
            count += 1
            print(f"{'ok    ' if found.passed else 'FAILED'} {case!s:70} distance {found.distance:.1e}  "
                  f"{found.ulps:5.2f} ulp  error x{found.ratio:.3f}  {found.same_rows} plaintext rows", flush=True)
            if not found.passed:
                failed.append(f"{case}, root {root}")
            key = f"{case.dtype} {case.scheme} {case.extra}".strip()
            ratios.setdefault(key, []).append(found.ratio)
            if key not in worst or found.distance > worst[key].distance:
                worst[key] = found
    worst_of = {key: {"distance": one.distance, "ulps": one.ulps, "ratios": spread(ratios[key])}
                for key, one in worst.items()}  # fmt: skip
    print(json.dumps({"device": options.device, "secure_device": options.secure_device, "cases": count,
                      "failed": failed, "head_dim": options.head_dim, "worst": worst_of}))  # fmt: skip
    return 1 if failed or not count else 0
