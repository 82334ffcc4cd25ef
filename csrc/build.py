"""C++ sources of this folder -> one shared library. Used by setup.py and by runtime/cpu.py.

    *.cpp --$CXX, two at a time--> objects --link with the running torch--> _C.<fingerprint>.so

The fingerprint (sources and flags) is in the file name, so a library built from other sources is
never picked up. Standard library only: torch need not be importable.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Every rounding is where the source puts it; FMA is used by name where it is wanted.
    "-ffp-contract=off",
    # LibTorch's stable ABI as of torch 2.11: the library runs on that and on every later torch.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)

LINK_FLAGS = (
    "-shared",
    # A compiler that links its C++ library in whole keeps it to itself: mixed with the copy that
    # torch uses, an error's text is cut short or the process ends.
    "-Wl,--exclude-libs,ALL",
)

COMPILERS = ("g++", "clang++", "c++")


class BuildError(Exception):
    """No library was built; the message says why."""


def fingerprint() -> str:
    """16 hex digits that change with the sources, the flags and the machine type."""
    digest = hashlib.sha256(repr((FLAGS, LINK_FLAGS, platform.machine())).encode())
    for path in sorted([*FOLDER.rglob("*.cpp"), *FOLDER.rglob("*.h")]):
        digest.update(path.relative_to(FOLDER).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def library_name() -> str:
    """File name of the library of these sources."""
    return f"_C.{fingerprint()}.so"


def find_compiler() -> list[str]:
    """Command of the C++ compiler: $CXX, else the first found of g++, clang++, c++.

    Raises:
        BuildError: there is none.
    """
    if wanted := os.environ.get("CXX"):
        command = shlex.split(wanted)
        if shutil.which(command[0]) is None:
            raise BuildError(f"the compiler CXX={wanted!r} was not found")
        return command
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise BuildError(f"no C++ compiler was found (tried {', '.join(COMPILERS)}; CXX names another)")


def build(target: Path, torch_folder: Path, compiler: list[str]) -> None:
    """Compile the sources against the torch package in `torch_folder`; put the library at `target`.

    The library appears at once and whole (written beside it, then renamed).

    Raises:
        BuildError: the compiler failed; the message ends with what it said.
    """
    include = f"-I{torch_folder / 'include'}"
    libraries = ["-L", str(torch_folder / "lib"), "-Wl,--no-as-needed", "-ltorch_cpu"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:

        def compile_one(source: Path) -> str:
            name = source.relative_to(FOLDER).with_suffix(".o").as_posix().replace("/", "_")
            output = str(Path(scratch) / name)
            _run([*compiler, *FLAGS, include, "-c", str(source), "-o", output])
            return output

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sorted(FOLDER.rglob("*.cpp"))))
        whole = Path(scratch) / target.name
        name = f"-Wl,-soname,{target.name}"  # runtime/entries.py finds the loaded library by it
        _run([*compiler, *LINK_FLAGS, name, "-o", str(whole), *objects, *libraries])
        os.replace(whole, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error}") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {said}")
