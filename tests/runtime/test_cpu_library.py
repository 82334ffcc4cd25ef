"""Finding, compiling and loading the C++ library: on demand, once, and never silently without."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ternc.csrc import build
from ternc.errors import KernelError
from ternc.runtime import cpu, ops

ROOT = Path(__file__).resolve().parents[2]

FAKE_COMPILER = """#!/bin/sh
# Logs every call; "links" by copying a finished library.
echo "$*" >> "{log}"
for argument; do
  case "$previous" in -o) output="$argument";; esac
  previous="$argument"
done
case "$*" in
  --version) echo fake 1.0;;
  -shared*) cp "{library}" "$output";;
  *) sleep 0.05; touch "$output";;
esac
"""


IMPORT = "from ternc.runtime import cpu\n"
NO_PREBUILT = IMPORT + "cpu._prebuilt = lambda: None\n"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def library() -> str:
    ops.register()
    if (path := cpu.load()) is None:
        pytest.skip("no C++ library")
    return path


@pytest.fixture
def fake_compiler(tmp_path, library) -> Path:
    script = tmp_path / "c++"
    script.write_text(FAKE_COMPILER.format(log=tmp_path / "log", library=library))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_importing_loads_nothing():
    done = run_python(
        f"{NO_PREBUILT}import torch\n"
        "assert cpu.isa() is None and cpu.available() == {}\n"
        "assert cpu.last_kernel(torch.zeros(1)) is None\n"
        "assert cpu.build.library_name() not in open('/proc/self/maps').read()",
        CXX="no-such-compiler",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_is_a_library_where_there_is_a_compiler():
    """Else the tests of its kernels skip, and nothing says that none of them ran."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    ops.register()
    assert cpu.isa() is not None, cpu.status()["reason"]


def test_compiled_once_by_two_processes(tmp_path, fake_compiler):
    environment = {
        **os.environ,
        "CXX": str(fake_compiler),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    code = NO_PREBUILT + "print(cpu.load())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in processes]
    (path,) = {out.strip() for out, _ in results}
    assert Path(path).is_file()
    assert Path(path).is_relative_to(tmp_path / "cache" / "ternc")
    notices = "".join(err for _, err in results)
    assert notices == "ternc: compiling CPU kernels (once) ...\n"
    calls = (tmp_path / "log").read_text().splitlines()
    sources = len(list(build.FOLDER.rglob("*.cpp")))
    assert sum(" -c " in call for call in calls) == sources
    assert sum(call.startswith("-shared") for call in calls) == 1
    # Nothing is left beside the library and its lock.
    assert sorted(p.name for p in Path(path).parent.iterdir()) == sorted([Path(path).name, "lock"])


def test_another_compiler_gets_its_own_library(tmp_path, fake_compiler):
    code = NO_PREBUILT + "print(cpu.load())"
    paths = set()
    for name in ("one", "two"):
        shutil.copy(fake_compiler, tmp_path / name)
        done = run_python(code, CXX=str(tmp_path / name), XDG_CACHE_HOME=str(tmp_path))
        paths.add(done.stdout.strip())
    assert len(paths) == 2


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "was not found"), ("false", "status 1")]
)
def test_without_a_compiler_the_references_run(tmp_path, compiler, reason):
    done = run_python(
        f"{NO_PREBUILT}import json, torch\n"
        "from ternc.formats import Quantized, pack\n"
        "from ternc.runtime import dispatch, ops\n"
        "ops.register(); ops.register()\n"
        "codes = torch.ones(2, 4, dtype=torch.int8)\n"
        "w = pack(Quantized(codes, torch.ones(2), None, 0, 1), 'cpu')\n"
        "y = torch.ops.ternc.linear(torch.ones(1, 4), w.weight, w.scale, None, None, 2, 0, 8, 11)\n"
        "print(json.dumps([y.tolist(), dispatch.last_kernel(w.weight), cpu.status()]))",
        CXX=compiler,
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    y, kernel, status = json.loads(done.stdout)
    assert y == [[pytest.approx(4.0, rel=1e-6)] * 2]
    assert kernel == "reference"
    assert (status["library"], status["isa"]) == (None, None)
    assert reason in status["reason"]
    assert done.stderr.count("RuntimeWarning") == 1
    assert reason in done.stderr


def test_environment_picks_the_instruction_set(library):
    code = IMPORT + "cpu.load(); print(cpu.isa())"
    for name, reason in cpu.available().items():
        if reason is None:
            assert run_python(code, TERNC_ISA=name).stdout.strip() == name


def test_an_unknown_instruction_set_is_an_error(library):
    done = run_python(IMPORT + "cpu.load()", TERNC_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ternc.errors.KernelError: TERNC_ISA=sse9 is not an instruction set")
    assert all(name in last for name in cpu.available())


def test_forcing_an_instruction_set(library):
    assert cpu.available()["scalar"] is None
    with pytest.raises(KernelError, match="'sse9' cannot run here: unknown; there are"):
        cpu.force_isa("sse9")
    before = cpu.isa()
    cpu.force_isa("scalar")
    assert cpu.isa() == "scalar"
    cpu.force_isa(None)
    assert cpu.isa() == before


def test_status(library):
    status = cpu.status()
    assert status["library"] == library
    assert status["reason"] is None
    assert status["isa"] in status["available"]


def test_records_survive_many_weights(library):
    ops.register()
    weights = [torch.zeros(1, 1, 64, dtype=torch.uint8) for _ in range(200)]
    for weight in weights:
        torch.ops.ternc.linear(torch.ones(1, 4), weight, torch.ones(1), None, None, 1, 0, 8, 11)
    assert all(cpu.last_kernel(weight) == cpu.isa() for weight in weights)
    for weight in weights[::2]:
        cpu.forget_kernel(weight)
    assert all(cpu.last_kernel(weight) is None for weight in weights[::2])
    assert all(cpu.last_kernel(weight) == cpu.isa() for weight in weights[1::2])


def test_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    shutil.copytree(build.FOLDER, copy)
    before = build.fingerprint()
    monkeypatch.setattr(build, "FOLDER", copy)
    assert build.fingerprint() == before
    header = copy / "generic" / "linear.h"
    header.write_text(header.read_text() + "\n")
    assert build.fingerprint() != before


@pytest.mark.parametrize("likes", [0, 1])
def test_who_decides_on_weights_in_1_6_bits(likes, monkeypatch):
    native = types.SimpleNamespace(ternc_likes_dense=lambda: likes)
    monkeypatch.delenv("TERNC_DENSE", raising=False)
    assert cpu._dense_from(native) == likes * cpu.L2_CODES
    for wanted in (0, 1):
        monkeypatch.setenv("TERNC_DENSE", str(wanted))
        assert cpu._dense_from(native) == wanted
    monkeypatch.setenv("TERNC_DENSE", "yes")
    with pytest.raises(KernelError, match="TERNC_DENSE"):
        cpu._dense_from(native)
