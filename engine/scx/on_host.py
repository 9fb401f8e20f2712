"""The secure side on the CPU of a GPU's machine: rows come into pinned memory, are mapped in C++ and go up again.

What maps them is a call of a thread (kernels/host_jobs.py) that stands in the GPU's stream; nobody waits. A session's
maps are written, and cleared, by jobs in the stream too: behind the steps that still run with what was there. It is no
isolation: keys and maps are in this process.
"""

from __future__ import annotations

import torch

from engine.scx.crossing import CrossingSide
from engine.scx.on_device import Staging
from engine.scx.schemes import Maps, map_dtype
from engine.scx.secure import Session, clear
from tessera_kernels import host_jobs


class HostSecureSide(CrossingSide):
    """The secure side on the CPU, with one key a session.

    by_bell: jobs are called by a word of memory (host_jobs.Bell), not as host functions of the driver; None: where
    there are cores enough.
    """

    by_bell: bool | None = None

    def _make_tables(self) -> list[Maps]:
        """See LocalSecureSide."""
        by_bell = host_jobs.bell_pays() if self.by_bell is None else self.by_bell
        self._bell = host_jobs.Bell() if by_bell and self.compute.type == "cuda" else None
        tables = super()._make_tables()
        self._staging = Staging(tuple(self._whole.shape[1:]), map_dtype(self.scheme), self.compute, pinned=False)
        return tables

    # ------------------------------------------------------------ sessions

    def _fill(self, slot: int, session: Session) -> None:
        """Derive a session's maps, and let the stream write them into its place."""

        def derive(staged: torch.Tensor) -> None:
            drawn = self.scheme.drawn(len(self.config.layers), self.shape.kv_heads, self.shape.head_dim)
            try:
                self.scheme.draw(session.keys, self.config.layers, 0, drawn)
                with torch.inference_mode():  # as what is staged may have been made
                    self.scheme.make(drawn, staged)
            finally:
                clear((drawn,))

        self._staging.send(derive, lambda staged: host_jobs.copy(self._whole[slot], staged, self.compute))

    def _clear_maps(self, slot: int) -> None:
        host_jobs.copy(self._whole[slot], None, self.compute)

    def shut(self) -> None:
        """See SecureSide. Waits until no job is left: they know memory by its address."""
        super().shut()
        if self.compute.type == "cuda":
            torch.cuda.synchronize(self.compute)
        if self._bell is not None:
            self._bell.stop()

    # ------------------------------------------------------------ rows

    def _reached(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.pin_memory() if self.compute.type == "cuda" else numbers.clone()

    def _map(self, crossing: host_jobs.Crossing, maps: Maps, alone: bool) -> None:
        host_jobs.encode(crossing, self._rope, (maps.q, maps.k, maps.v), self.shape.heads, self.compute, self._bell)

    def _unmap(self, crossing: host_jobs.Crossing, out_map: torch.Tensor, alone: bool) -> None:
        host_jobs.decode(crossing, out_map, self.shape.heads, self.compute, self._bell)
