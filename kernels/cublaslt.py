"""y = x W^T by NVIDIA's library on a GPU, with the algorithm that was measured fastest for a shape.

PyTorch takes the first algorithm that cuBLASLt proposes. On an H200 a later proposal is often 3 to 20 % faster for 64
to 512 rows, and once almost twice (448 rows of a 28,672 x 4,096 weight: 289 us against 153). Which one it is, is kept
as its place in the list of proposals, which one version of the library gives in one order on one device; or, where a
search went beyond the proposals (scripts/gpu_library.py), as the numbers that make an algorithm (SETTINGS). It knows
nothing of layers. libcublasLt is the one that PyTorch has loaded; where there is none, callers use PyTorch.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch

from tessera_kernels.checks import require

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 32 << 20
ALIGNED_BYTES = 256
PROPOSALS = 16  # asked for; the library gives about 8
_COMPUTE_F32, _F32, _TRANSPOSED = 68, 0, 1
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_SET_TRANSPOSE_A, _SET_MOST_WORKSPACE = 3, 1
# number of cublasLtMatmulAlgoConfigAttributes_t -> its bytes; 0, the algorithm's id, is read only
SETTINGS = {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 2, 8: 2}
Choice = int | tuple[int, ...]  # a proposal's place, or one number for each of SETTINGS


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]  # fmt: skip


class LibraryError(RuntimeError):
    """cuBLASLt is not here, or refused a call."""


def check(status: int, call: str) -> None:
    """Raise LibraryError for what a call returned, unless it is success."""
    if status:
        raise LibraryError(f"{call} returned cuBLAS status {status}")


class _Library:
    """One handle and workspace; calls of one stream after the other may share them."""

    def __init__(self) -> None:
        major = (torch.version.cuda or "0").partition(".")[0]
        try:
            self.calls = ctypes.CDLL(f"libcublasLt.so.{major}")
        except OSError as error:
            raise LibraryError(f"libcublasLt.so.{major} cannot be loaded: {error}") from None
        self.calls.cublasLtGetVersion.restype = ctypes.c_size_t
        self.version = int(self.calls.cublasLtGetVersion())
        self.handle = ctypes.c_void_p()
        check(self.calls.cublasLtCreate(ctypes.byref(self.handle)), "cublasLtCreate")
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def layout(self, dtype: torch.dtype, rows: int, columns: int, step: int) -> ctypes.c_void_p:
        """A column-major matrix."""
        made = ctypes.c_void_p()
        check(self.calls.cublasLtMatrixLayoutCreate(ctypes.byref(made), _TYPES[dtype], ctypes.c_uint64(rows),
                                                    ctypes.c_uint64(columns), ctypes.c_int64(step)),
              "cublasLtMatrixLayoutCreate")  # fmt: skip
        return made


@cache
def _library() -> _Library:
    return _Library()


@cache
def version() -> int | None:
    """The library's version number; None where it cannot be used."""
    try:
        return _library().version if torch.cuda.is_available() else None
    except LibraryError:
        return None


class Product:
    """x (M, K) times weight (N, K) transposed, for one M, N, K and dtypes: its proposals, ready to run.

    Descriptors live as long as the process; there are as many as shapes, not calls.
    """

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        library = self._library = _library()
        calls = self.calls = library.calls
        self._what = ctypes.c_void_p()
        check(calls.cublasLtMatmulDescCreate(ctypes.byref(self._what), _COMPUTE_F32, _F32), "cublasLtMatmulDescCreate")
        transposed = ctypes.c_int(_TRANSPOSED)
        check(calls.cublasLtMatmulDescSetAttribute(self._what, _SET_TRANSPOSE_A, ctypes.byref(transposed),
                                                   ctypes.c_size_t(4)), "cublasLtMatmulDescSetAttribute")  # fmt: skip
        # row-major (N, K) is column-major (K, N): y^T = (W^T)^T x^T
        self._w, self._x = library.layout(dtype, k, n, k), library.layout(dtype, k, m, k)
        self._y = library.layout(out_dtype, n, m, n)
        prefer = ctypes.c_void_p()
        check(calls.cublasLtMatmulPreferenceCreate(ctypes.byref(prefer)), "cublasLtMatmulPreferenceCreate")
        most = ctypes.c_size_t(WORKSPACE_BYTES)
        check(calls.cublasLtMatmulPreferenceSetAttribute(prefer, _SET_MOST_WORKSPACE, ctypes.byref(most),
                                                         ctypes.c_size_t(8)),
              "cublasLtMatmulPreferenceSetAttribute")  # fmt: skip
        found, count = (_Proposal * PROPOSALS)(), ctypes.c_int(0)
        status = calls.cublasLtMatmulAlgoGetHeuristic(
            library.handle, self._what, self._w, self._x, self._y, self._y, prefer, PROPOSALS, found,
            ctypes.byref(count),
        )  # fmt: skip
        calls.cublasLtMatmulPreferenceDestroy(prefer)
        check(status, "cublasLtMatmulAlgoGetHeuristic")
        self.proposals = [found[i] for i in range(count.value) if found[i].state == 0]
        self._types = (_TYPES[dtype], _TYPES[out_dtype])
        self._made: dict[tuple[int, ...], _Proposal] = {}
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    def algorithm(self, settings: tuple[int, ...]) -> _Proposal:
        """The algorithm of these numbers. Raises LibraryError where this product cannot run by it."""
        calls, made, kind = self._library.calls, _Proposal(), self._types
        check(calls.cublasLtMatmulAlgoInit(self._library.handle, _COMPUTE_F32, _F32, kind[0], kind[0], kind[1],
                                           kind[1], settings[0], ctypes.byref(made)),
              "cublasLtMatmulAlgoInit")  # fmt: skip
        for (number, size), value in list(zip(SETTINGS.items(), settings, strict=True))[1:]:
            check(calls.cublasLtMatmulAlgoConfigSetAttribute(
                ctypes.byref(made), number, ctypes.byref(ctypes.c_int32(value)), ctypes.c_size_t(size),
            ), "cublasLtMatmulAlgoConfigSetAttribute")  # fmt: skip
        checked = _Proposal()
        check(calls.cublasLtMatmulAlgoCheck(self._library.handle, self._what, self._w, self._x, self._y, self._y,
                                            ctypes.byref(made), ctypes.byref(checked)),
              "cublasLtMatmulAlgoCheck")  # fmt: skip
        if checked.workspace_bytes > WORKSPACE_BYTES:
            raise LibraryError(f"it wants a workspace of {checked.workspace_bytes} bytes; there are {WORKSPACE_BYTES}")
        return made

    def proposal(self, choice: Choice) -> _Proposal:
        """The algorithm of a choice. Raises LibraryError where there is none of it."""
        if isinstance(choice, int):
            if choice >= len(self.proposals):
                raise LibraryError(f"proposal {choice} of {len(self.proposals)} is not there")
            return self.proposals[choice]
        if choice not in self._made:
            self._made[choice] = self.algorithm(choice)
        return self._made[choice]

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, choice: Choice, *, add: bool) -> None:
        """y = x W^T, plus y when `add`, on the current stream. All contiguous and of the shapes this was made for."""
        library, proposal = self._library, self.proposal(choice)
        pointer = ctypes.c_void_p
        check(library.calls.cublasLtMatmul(
            library.handle, self._what, ctypes.byref(self._one), pointer(weight.data_ptr()), self._w,
            pointer(x.data_ptr()), self._x, ctypes.byref(self._one if add else self._zero), pointer(y.data_ptr()),
            self._y, pointer(y.data_ptr()), self._y, ctypes.byref(proposal), pointer(library.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES), pointer(torch.cuda.current_stream().cuda_stream),
        ), "cublasLtMatmul")  # fmt: skip


@cache
def product(m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype) -> Product:
    """The product of this shape. Raises LibraryError."""
    return Product(m, n, k, dtype, out_dtype)


@cache
def _ranks(device_name: str) -> dict[str, dict[str, int | list[int]]]:
    """{"NxK": {"M": the fastest}} measured on this device with the library that is loaded."""
    from tessera_kernels.triton_support import tuning

    table: dict[str, Any] = tuning(device_name).get("library", {})
    return table.get("ranks", {}) if table.get("version") == version() else {}


@cache
def _measured(m: int, n: int, k: int, out_dtype: torch.dtype, device_name: str) -> Choice | None:
    """The algorithm that the table names for bfloat16, where it can be run here: another driver or device of that name
    may propose others, and then nobody shall find out in the middle of a request."""
    found = _ranks(device_name).get(f"{n}x{k}", {}).get(str(m))
    if found is None:
        return None
    choice = tuple(found) if isinstance(found, list) else found
    try:
        product(m, n, k, torch.bfloat16, out_dtype).proposal(choice)
    except LibraryError as error:
        log.warning("the product of %d rows by %dx%d goes to PyTorch: %s", m, n, k, error)
        return None
    return choice


def forget_table() -> None:
    """The table is read anew: it was measured just now."""
    _ranks.cache_clear()
    _measured.cache_clear()


def measured_matmul(
    x: torch.Tensor, weight: torch.Tensor, *, add_to: torch.Tensor | None = None, float_out: bool = False
) -> torch.Tensor | None:
    """matmul() by the algorithm measured for this shape; None, and nothing done, where PyTorch's call is as good, where
    nobody measured, or where the tensors do not lie as those did that were measured."""
    if not x.is_cuda or x.dtype is not torch.bfloat16:
        return None
    out_dtype = torch.float32 if float_out else x.dtype
    choice = _measured(x.shape[0], weight.shape[0], x.shape[1], out_dtype, torch.cuda.get_device_name(x.device))
    if choice is None or not all(map(_lies_well, (x, weight) if add_to is None else (x, weight, add_to))):
        return None
    return matmul(x, weight, choice, add_to=add_to, float_out=float_out)


def _lies_well(tensor: torch.Tensor) -> bool:
    """Whether proposals hold for it: the library takes addresses to be multiples of ALIGNED_BYTES unless told."""
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNED_BYTES == 0


def matmul(
    x: torch.Tensor, weight: torch.Tensor, choice: Choice, *, add_to: torch.Tensor | None = None,
    float_out: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x (M, K) -> x W^T, (M, N), of weight (N, K), by the algorithm chosen.

    add_to (M, N): the product is added in place, rounded once. float_out: float32, not rounded. Raises ValueError for a
    wrong shape, dtype or stride, LibraryError when the library refuses.
    """
    m, k = x.shape
    n = weight.shape[0]
    require(weight.shape == (n, k) and x.dtype is weight.dtype and x.is_contiguous() and weight.is_contiguous(),
            "x is %s %s and weight %s %s; want (M, K) and (N, K) of one dtype, contiguous", tuple(x.shape), x.dtype,
            tuple(weight.shape), weight.dtype)  # fmt: skip
    out_dtype = torch.float32 if float_out else x.dtype
    require(add_to is None or (add_to.shape == (m, n) and add_to.is_contiguous() and add_to.dtype is out_dtype),
            "add_to wants (%d, %d) %s contiguous", m, n, out_dtype)  # fmt: skip
    y = torch.empty((m, n), dtype=out_dtype, device=x.device) if add_to is None else add_to
    product(m, n, k, x.dtype, out_dtype)(x, weight, y, choice, add=add_to is not None)
    return y
