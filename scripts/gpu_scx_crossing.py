"""What a round trip through the host consists of: each piece alone, as a CUDA graph of many of them, in microseconds.

Rows of a decode step of the shape, permutations, bfloat16. Beside the kernels of engine/scx/on_host.py stand what they
took the place of: copies by the copy engine, and host functions that the driver calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from scripts.gpu_timing import graph_us
from tessera_kernels import host_jobs
from tessera_kernels.triton_crossing import carry
from tessera_kernels.triton_rope_store import rope_store

BF16 = torch.bfloat16
SLOTS = 256


def measure(shape: dict[str, Any], tokens: int) -> Iterator[dict[str, Any]]:
    """Lines of what and us. Raises RuntimeError where rows arrive that are not those that were sent."""
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    dim = shape.get("head_dim") or shape["hidden_size"] // heads
    width, device = (heads + 2 * groups) * dim, torch.device("cuda")
    there = torch.randn(tokens, width, device=device).to(BF16)
    came, goes = (torch.zeros(tokens, width, dtype=BF16, pin_memory=True) for _ in range(2))
    columns = [torch.arange(tokens, dtype=torch.int32).pin_memory() for _ in range(3)]
    maps = torch.rand(4, SLOTS, groups, dim).argsort(dim=-1).to(torch.int16)
    angles = torch.rand(4096, 2, dim // 2)
    unturned = torch.zeros(1, 2, dim // 2, device=device)
    unturned[:, 0] = 1
    k, v = torch.zeros(2, SLOTS, 16, groups, dim, dtype=BF16, device=device).unbind(0)
    slots, still = torch.arange(tokens, dtype=torch.int32, device=device), torch.zeros(tokens, dtype=torch.int32,
                                                                                       device=device)  # fmt: skip
    q = torch.empty(tokens, heads, dim, dtype=BF16, device=device)
    whole = host_jobs.Crossing(came, goes, *columns)
    out = heads * dim
    outputs = host_jobs.Crossing(*(x.flatten()[: tokens * out].view(tokens, out) for x in (came, goes)), *columns)
    attended, landed = there.flatten()[: tokens * out].view(tokens, out), torch.empty_like(outputs.goes, device=device)

    def encode(bell: host_jobs.Bell | None) -> None:
        host_jobs.encode(whole, angles, (maps[0], maps[1], maps[2]), heads, device, bell)

    def decode(bell: host_jobs.Bell | None) -> None:
        host_jobs.decode(outputs, maps[3], heads, device, bell)

    def store() -> None:
        rope_store(goes, unturned, still, slots, k, v, heads, rows=still, out=q)

    def encode_whole(bell: host_jobs.Bell | None) -> None:
        carry(there, came)
        encode(bell)
        store()

    def decode_whole(bell: host_jobs.Bell | None) -> None:
        carry(attended, outputs.came)
        decode(bell)
        carry(outputs.goes, landed)

    def nothing(bell: host_jobs.Bell | None) -> None:  # a job that has nothing to map: no tokens
        host_jobs.decode(outputs._replace(came=outputs.came[:0], goes=outputs.goes[:0]), maps[3], heads, device, bell)

    def line(what: str, work: Callable[[], object]) -> dict[str, Any]:
        return {"what": what, "us": graph_us(lambda i: work(), 1, calls=20, target_ms=20)}

    size = f"{there.nbytes / 1e3:.0f} kB"
    yield line(f"down, {size}: kernel", lambda: carry(there, came))
    yield line(f"down, {size}: copy engine", lambda: came.copy_(there, non_blocking=True))
    yield line(f"up, {size}: store kernel reads it", store)
    yield line(f"up, {size}: copy engine", lambda: there.copy_(goes, non_blocking=True))
    yield line(f"up, {outputs.goes.nbytes / 1e3:.0f} kB: kernel", lambda: carry(outputs.goes, landed))
    yield line("host function, nothing to do", lambda: nothing(None))
    yield line("host function, encode", lambda: encode(None))
    yield line("host function, decode", lambda: decode(None))
    def check(bell: host_jobs.Bell | None, name: str) -> None:
        """Other rows each time: what anybody kept of the last ones shows."""
        for _ in range(4):
            there.normal_()
            want = there.cpu(), torch.empty(tokens, width, dtype=BF16)
            host_jobs.encode(whole._replace(came=want[0], goes=want[1]), angles, (maps[0], maps[1], maps[2]), heads,
                             torch.device("cpu"))  # fmt: skip
            encode_whole(bell)
            stored = torch.cat([x.cpu().flatten(1) for x in (q, k[:tokens, 0], v[:tokens, 0])], dim=1)
            back = torch.empty(tokens, out, dtype=BF16)
            host_jobs.decode(outputs._replace(came=attended.cpu(), goes=back), maps[3], heads, torch.device("cpu"))
            decode_whole(bell)
            if not (torch.equal(stored, want[1]) and torch.equal(landed.cpu(), back)):
                raise RuntimeError(f"{name}: other rows came back than were sent")

    check(None, "host function")
    for threads in (1, 2, 4, 8, 12):
        bell = host_jobs.Bell(threads)
        check(bell, f"bell, {threads} threads")
        yield line(f"bell, {threads} threads, nothing to do", lambda bell=bell: nothing(bell))  # type: ignore[misc]
        yield line(f"bell, {threads} threads, encode", lambda bell=bell: encode(bell))  # type: ignore[misc]
        yield line(f"bell, {threads} threads, decode", lambda bell=bell: decode(bell))  # type: ignore[misc]
        yield line(f"bell, {threads} threads, encode with both ways", lambda bell=bell: encode_whole(bell))  # type: ignore[misc]
        yield line(f"bell, {threads} threads, decode with both ways", lambda bell=bell: decode_whole(bell))  # type: ignore[misc]
        torch.cuda.synchronize()
        bell.stop()
    yield line("host function, encode with both ways", lambda: encode_whole(None))
    yield line("host function, decode with both ways", lambda: decode_whole(None))
    torch.cuda.synchronize()
