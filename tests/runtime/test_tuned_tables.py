"""The tuned tables: every line is a tile that exists; GPUs of a kind share what they measured."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from ternc.runtime.kernels.triton import select
from ternc.runtime.kernels.triton.gemm_config import GemmConfig
from ternc.runtime.kernels.triton.linear_gemv import GemvConfig


@pytest.mark.parametrize("path", sorted(select.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_lines(path):
    table = json.loads(path.read_text())
    assert path == select.table_path(table["device"])
    for key, values in table["configurations"].items():
        kernel, rows, columns, planes, groups = key.rsplit(" ", 4)
        assert min(int(rows), int(columns)) > 0 and int(planes) in (1, 2, 3) and int(groups) < 3
        if kernel in (select.GEMV, select.INTEGERS, select.GATED):
            assert GemvConfig(*values).warps in (2, 4, 8, 16)
        else:
            assert int(kernel.removeprefix("gemm ")) in select.BUCKETS
            assert GemmConfig(*values).split in range(1, 9)


def write(folder, name, processors, lines):
    facts = {"device": name, "capability": 90, "processors": processors}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(facts | {"configurations": lines}))


def test_gpus_of_a_kind_share_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "TABLES", tmp_path)
    select._table.cache_clear()
    write(tmp_path, "a", 132, {"one": [1], "two": [2]})
    write(tmp_path, "b", 132, {"two": [3]})
    write(tmp_path, "c", 114, {"three": [4]})
    assert select._table("b", 90, 132) == {"one": [1], "two": [3]}
    assert select._table("unknown", 90, 114) == {"three": [4]}
    assert select._table("unknown", 80, 108) == {}
    select._table.cache_clear()
