"""The C++ kernels' folder, importable under its own name: `tessera_kernels.cpu.available()`.

It knows nothing itself; see tessera_kernels.native.
"""

from tessera_kernels.native import available, set_threads, threads

__all__ = ["available", "set_threads", "threads"]
