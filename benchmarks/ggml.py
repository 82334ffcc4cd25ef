"""ggml's CPU backend through ctypes: y = x W^T with W in one of ggml's block types.

Its interface is C, so nothing of it is compiled here: llama-cpp-python, or $GGML_LIB_DIR, has the
shared libraries. One graph a copy of the weight, weights in the buffer type that llama.cpp would
choose (the repacking ones first). Only a build with OpenMP runs on more than one thread: it then
shares torch's threads. Threads of its own would wait in a loop for cores on which torch's threads,
back from an earlier contender, still spin: 12 ms for a product of 0.2 ms on two cores.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import common
import torch

TYPES = {"Q4_0": 2, "Q8_0": 8, "TQ1_0": 34, "TQ2_0": 35}
BLOCK = 256
"""Columns of the largest block among `TYPES`."""
FLOAT32 = 0
ERROR = {"Q4_0": 0.15, "Q8_0": 0.03, "TQ1_0": 0.03, "TQ2_0": 0.03}
"""Largest relative error on ternary weights: int8 activations, and 4-bit weights in Q4_0."""

P, SIZE, I64, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class _InitParams(ctypes.Structure):
    _fields_ = (("size", SIZE), ("buffer", P), ("no_alloc", ctypes.c_bool))


class _Feature(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


FUNCTIONS = {
    "ggml_init": (P, [_InitParams]),
    "ggml_free": (None, [P]),
    "ggml_new_tensor_2d": (P, [P, INT, I64, I64]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_row_size": (SIZE, [INT, I64]),
    "ggml_quantize_chunk": (SIZE, [INT, P, P, I64, I64, I64, P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_buffer_free": (None, [P]),
    "ggml_backend_tensor_set": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_tensor_get": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_graph_compute": (INT, [P, P]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [P, P]),
    "ggml_backend_reg_dev_get": (P, [P, SIZE]),
    "ggml_backend_reg_get_proc_address": (P, [P, ctypes.c_char_p]),
    "ggml_log_set": (None, [P, P]),
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_reg": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, INT]),
    "ggml_backend_cpu_buffer_type": (P, []),
}


class Library:
    """The functions of FUNCTIONS, one CPU backend, and the buffer types it prefers."""

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(min(folder.glob("libggml-cpu*.so"))), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(cpu if "_cpu_" in name else base, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self._quiet = ctypes.CFUNCTYPE(None, INT, P, P)(lambda *_: None)
        self.log_set(self._quiet, None)
        self.backend = self.backend_cpu_init()
        registry = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(registry, 0)
        self.buffer_types = [self.backend_cpu_buffer_type()]
        if extra := self._array(P, b"ggml_backend_dev_get_extra_bufts", registry, self.device):
            count = next(i for i in range(64) if not extra[i])
            self.buffer_types[:0] = extra[:count]
        features = self._array(_Feature, b"ggml_backend_get_features", registry, registry)
        names = itertools.takewhile(bool, (features[i].name for i in range(64)) if features else ())
        self.shares_threads = b"OPENMP" in names

    def _array(self, item: type, name: bytes, registry: int, argument: int) -> Any:
        """What a function of the backend returns that is found by name; None without one."""
        address = self.backend_reg_get_proc_address(registry, name)
        return address and ctypes.CFUNCTYPE(ctypes.POINTER(item), P)(address)(argument)

    def context(self, tensors: int) -> int:
        """A context of tensors without memory of their own."""
        return self.init(_InitParams((1 << 17) + tensors * (1 << 17), None, True))


@functools.cache
def library() -> Library | None:
    """ggml, where it is installed."""
    folder = os.environ.get("GGML_LIB_DIR")
    if folder is None and (spec := importlib.util.find_spec("llama_cpp")) and spec.origin:
        folder = str(Path(spec.origin).parent / "lib")
    if folder is None or not (Path(folder) / "libggml-base.so").is_file():
        return None
    return Library(Path(folder))


def linear(kind: str, rows: int, x: torch.Tensor, hot: bool) -> common.Contender | str:
    """Random ternary weights [rows, K] in the block type `kind`, checked against fp32."""
    tokens, columns = x.shape
    if columns % BLOCK:
        return f"a shape of no {BLOCK} columns"
    if (ggml := library()) is None:
        return "llama-cpp-python is not installed"
    if torch.get_num_threads() > 1 and not ggml.shares_threads:
        return "built without OpenMP"
    w = torch.randint(-1, 2, (rows, columns)).float()
    nbytes = ggml.row_size(TYPES[kind], columns) * rows
    stored = torch.empty(nbytes, dtype=torch.uint8)
    ggml.quantize_chunk(TYPES[kind], w.data_ptr(), stored.data_ptr(), 0, rows, columns, None)
    copies = 1 if hot else common.copies_of(nbytes)
    weights, results, graphs, inputs = _graphs(ggml, kind, (rows, columns, tokens), copies)
    for weight in weights:
        ggml.backend_tensor_set(weight, stored.data_ptr(), 0, nbytes)
    for tensor in inputs:
        ggml.backend_tensor_set(tensor, x.data_ptr(), 0, x.nbytes)
    ggml.backend_cpu_set_n_threads(ggml.backend, torch.get_num_threads())
    y = torch.empty(tokens, rows)

    def run(i: int) -> torch.Tensor:
        ggml.backend_graph_compute(ggml.backend, graphs[i])
        return y

    run(0)
    ggml.backend_tensor_get(results[0], y.data_ptr(), 0, y.nbytes)
    exact = x @ w.T
    assert (y - exact).norm() <= ERROR[kind] * exact.norm()
    return common.Contender(f"ggml {kind}", run, copies, nbytes)


def _graphs(
    ggml: Library, kind: str, sizes: tuple[int, int, int], copies: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Weights, results, graphs and inputs of `copies` products; memory lives with the process."""
    rows, columns, tokens = sizes
    for buffer_type in ggml.buffer_types:
        stored = ggml.context(copies)
        weights = [ggml.new_tensor_2d(stored, TYPES[kind], columns, rows) for _ in range(copies)]
        ggml.backend_alloc_ctx_tensors_from_buft(stored, buffer_type)
        working = ggml.context(3 * copies)
        inputs = [ggml.new_tensor_2d(working, FLOAT32, columns, tokens) for _ in range(copies)]
        results = [ggml.mul_mat(working, *pair) for pair in zip(weights, inputs, strict=True)]
        if ggml.backend_dev_supports_op(ggml.device, results[0]):
            break
    ggml.backend_alloc_ctx_tensors_from_buft(working, ggml.backend_cpu_buffer_type())
    graphs = []
    for result in results:
        graphs.append(ggml.new_graph(working))
        ggml.build_forward_expand(graphs[-1], result)
    return weights, results, graphs, inputs
