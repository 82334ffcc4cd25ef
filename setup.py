"""Builds csrc/ into ternc/_C.<fingerprint>.so where torch is visible (--no-build-isolation).

Everything else is in pyproject.toml. Without torch or a C++ compiler the install succeeds all the
same: `ternc.runtime.cpu` then compiles at first use, or runs the eager references.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_build() -> ModuleType:
    """csrc/build.py, by path: neither ternc nor torch is importable in a build environment."""
    spec = importlib.util.spec_from_file_location("ternc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()


class BuildKernels(build_ext):
    """One shared library, loaded by torch.ops.load_library: not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / build.library_name())

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            torch = importlib.util.find_spec("torch")
            if torch is None:
                raise build.BuildError("torch is not visible here (use --no-build-isolation)")
            build.build(target, Path(torch.origin).parent, build.find_compiler())
        except (build.BuildError, OSError) as error:
            print(
                f"ternc: CPU kernels not built, they will be at first use: {error}", file=sys.stderr
            )

    def copy_extensions_to_source(self) -> None:
        for stale in (ROOT / "ternc").glob("_C.*.so"):
            stale.unlink()
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """The library links no Python symbols: one wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # optional: an editable install does not fail where the library was not built.
    ext_modules=[Extension("ternc._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
