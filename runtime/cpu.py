"""The C++ kernels of csrc/: found prebuilt, or compiled once per machine, and loaded on demand.

    csrc/ --setup.py--> ternc/_C.<fingerprint>.so            with torch visible at install
          --here, at first use--> ~/.cache/ternc/<key>/...   otherwise

Without a compiler there is no library: the eager references run, with one warning.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import torch

import ternc
from ternc.csrc import build
from ternc.errors import KernelError
from ternc.formats import layouts


@dataclasses.dataclass(frozen=True)
class Library:
    """What `load` found: a loaded library, or the reason why there is none."""

    path: Path | None
    native: ctypes.CDLL | None
    reason: str | None


_lock = threading.Lock()

L2_CODES = 4 << 20
"""One plane of 1 MB at two bits a code."""


def load() -> str | None:
    """Load the kernels, compiling them if need be; the path of the library, None if there is none.

    Registers the C++ implementations of the ternc:: operators. Works once per process; a failure
    is one warning.

    Raises:
        KernelError: the environment variable TERNC_ISA names an instruction set that cannot run.
    """
    with _lock:
        library = _library()
    if library.native is None:
        return None
    if error := library.native.ternc_isa_error():
        raise KernelError(error.decode())
    layouts.prefer_dense(_dense_from(library.native))
    return str(library.path)


def _dense_from(native: ctypes.CDLL) -> int:
    """Codes from which on weights of one plane are held in 1.6 bits; 0: none.

    TERNC_DENSE=1 asks for it, 0 refuses it. Else where it is faster: weights beyond a core's L2
    (1.2 times one token's 2-bit rate at 4096 -> 14336 on Zen 5), where bytes can be permuted.
    """
    wanted = os.environ.get("TERNC_DENSE", "")
    if wanted not in ("", "0", "1"):
        raise KernelError(f"TERNC_DENSE={wanted!r} is neither 0 nor 1")
    if wanted:
        return int(wanted)
    return L2_CODES if native.ternc_likes_dense() else 0


def isa() -> str | None:
    """Instruction set in use (`amx`, `avx512vnni`, ...); None where no library is loaded."""
    name = native.ternc_isa_name() if (native := _native()) else None
    return name.decode() if name else None


def available() -> dict[str, str | None]:
    """Every instruction set of the source, best first -> None if usable here, else why not."""
    if (native := _native()) is None:
        return {}
    names: list[bytes] = []
    while name := native.ternc_isa_at(len(names)):
        names.append(name)
    reasons = {name.decode(): native.ternc_isa_missing(name) for name in names}
    return {name: reason.decode() if reason else None for name, reason in reasons.items()}


def force_isa(name: str | None) -> None:
    """Use one instruction set from now on, in the whole process; None: the choice made at start.

    Raises:
        KernelError: this machine cannot run it, or the library is not loaded.
    """
    if (native := _native()) is None:
        raise KernelError(f"instruction set {name!r}: the C++ library is not loaded")
    if native.ternc_isa_force(name.encode() if name else None):
        reason = available().get(name or "", f"unknown; there are {', '.join(available())}")
        raise KernelError(f"instruction set {name!r} cannot run here: {reason}")


ENTRIES = (
    "linear",
    "linears1",
    "linears2",
    "linears3",
    "linears4",
    "token_linears1",
    "token_linears2",
    "token_linears3",
    "token_linears4",
    "norm_quantize",
    "activate_quantize",
    "hadamard",
    "attention",
    "quantize_act",
    "embedding",
)
"""Operators that the library has an entry point for (csrc/entry.h)."""


def library_name() -> str | None:
    """Name under which the loader knows the loaded library; None where none is loaded."""
    return build.library_name() if _native() else None


def last_kernel(weight: torch.Tensor) -> str | None:
    """Instruction set whose kernel last read this packed weight; None where none did."""
    name = native.ternc_last_kernel(weight.data_ptr()) if (native := _native()) else None
    return name.decode() if name else None


def forget_kernel(weight: torch.Tensor) -> None:
    """Drop what the library remembers of this packed weight's address."""
    if native := _native():
        native.ternc_forget_kernel(weight.data_ptr())


def status() -> dict[str, object]:
    """Facts for `ternc info`: library path or reason, instruction set, what is available."""
    path = load()
    return {
        "library": path,
        "reason": _library().reason,
        "isa": isa(),
        "available": available(),
    }


def _native() -> ctypes.CDLL | None:
    """The loaded library; never loads it."""
    return _library().native if _library.cache_info().currsize else None


@functools.cache
def _library() -> Library:
    reasons = []
    for find in (_prebuilt, _compiled):
        try:
            if path := find():
                return Library(path, _open(path), None)
        except (build.BuildError, OSError) as error:
            reasons.append(str(error))
    reason = "; ".join(reasons)
    warnings.warn(
        f"ternc: no CPU kernels, the slow eager references run instead: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return Library(None, None, reason)


def _prebuilt() -> Path | None:
    """The library that setup.py built from exactly these sources."""
    name = build.library_name()
    return next((path for home in ternc.__path__ if (path := Path(home) / name).is_file()), None)


def _compiled() -> Path:
    """The library in the per-user cache, compiled first if it is not there.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = build.find_compiler()
    path = _cache_folder() / _cache_key(compiler) / build.library_name()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        if not path.is_file():
            print("ternc: compiling CPU kernels (once) ...", file=sys.stderr, flush=True)
            build.build(path, Path(torch.__file__).parent, compiler)
    return path


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ternc"


def _cache_key(compiler: list[str]) -> str:
    """Digest of what, beside the sources, decides the library: torch and the compiler."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(repr((torch.__version__, compiler, version)).encode()).hexdigest()[:16]


def _open(path: Path) -> ctypes.CDLL:
    """Load the library into torch and declare its C functions."""
    torch.ops.load_library(str(path))
    native = ctypes.CDLL(str(path))
    for name, arguments in {
        "ternc_isa_at": [ctypes.c_int],
        "ternc_isa_missing": [ctypes.c_char_p],
        "ternc_isa_name": [],
        "ternc_isa_error": [],
        "ternc_last_kernel": [ctypes.c_void_p],
    }.items():
        getattr(native, name).argtypes = arguments
        getattr(native, name).restype = ctypes.c_char_p
    native.ternc_isa_force.argtypes = [ctypes.c_char_p]
    native.ternc_isa_force.restype = ctypes.c_int
    native.ternc_likes_dense.argtypes = []
    native.ternc_likes_dense.restype = ctypes.c_int
    native.ternc_forget_kernel.argtypes = [ctypes.c_void_p]
    native.ternc_forget_kernel.restype = None
    return native
