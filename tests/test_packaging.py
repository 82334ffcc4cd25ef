"""pyproject.toml tells the truth: every folder is a listed package, the entry points load."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ternc

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def folders_with_python():
    for top in ("ternc", "passes", "runtime"):
        for folder in (ROOT / top, *(ROOT / top).rglob("*/")):
            if any(folder.glob("*.py")):
                name = ".".join(folder.relative_to(ROOT).parts)
                yield name if top == "ternc" else f"ternc.{name}"


def test_listed_packages_are_the_folders():
    assert sorted(SETUPTOOLS["packages"]) == sorted([*folders_with_python(), "ternc.csrc"])


def test_every_package_has_an_init():
    mapping = sorted(SETUPTOOLS["package-dir"].items(), key=lambda item: -len(item[0]))
    for package in SETUPTOOLS["packages"]:
        name, folder = next(
            item for item in mapping if package == item[0] or package.startswith(item[0] + ".")
        )
        path = ROOT / folder / package[len(name) + 1 :].replace(".", "/")
        assert (path / "__init__.py").is_file(), package


def test_the_package_holds_every_file(tmp_path):
    """What setuptools puts into a wheel, but for the compiled library."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    packaged = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    sources = set()
    for top in ("ternc", "passes", "runtime", "csrc"):
        for path in (ROOT / top).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h", ".json", ".typed", ".html", ".css", ".js"):
                name = path.relative_to(ROOT).as_posix()
                sources.add(name if top == "ternc" else f"ternc/{name}")
    assert packaged == sources


def test_entry_points_load():
    groups = [PROJECT["project"]["scripts"], *PROJECT["project"]["entry-points"].values()]
    for target in (target for group in groups for target in group.values()):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), target


def test_version_is_said_once():
    assert PROJECT["project"]["version"] == ternc.__version__


def test_development_versions_satisfy_the_package():
    """Every dependency of ternc is pinned for development."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints-dev.txt").read_text().lower().splitlines()
        if not line.startswith("#")
    )
    for requirement in PROJECT["project"]["dependencies"]:
        name, least = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        pinned = [int(part) for part in pins[name].split(".")]
        assert pinned >= [int(part) for part in least.split(".")], requirement


def test_makefile_pins_the_same_torch():
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch.group(1) in (ROOT / "constraints-dev.txt").read_text().splitlines()
