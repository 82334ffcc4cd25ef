"""The library's entry points, called as compiled C++ calls them, against the dispatcher."""

from __future__ import annotations

import copy
import ctypes
import pickle

import pytest
import torch
from reference import random_quantized, token_arguments

from ternc.formats import pack
from ternc.runtime import cpu, entries, ops

ops.register()
pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="no C++ library here")


def weight(rows, columns, group_size):
    return pack(random_quantized(rows, columns, 1, group_size, "row"), "cpu")


def arguments(name):
    """What the op `name` takes: every kind of argument, present and left out."""
    x = torch.randn(3, 2, 64)
    w, v = weight(96, 64, 32), weight(40, 64, 0)
    bias = torch.randn(96)
    dtype = torch.float32
    if name == "linear":
        return [x, w.weight, w.scale, w.multiplier, bias, 96, w.group_size, 8, w.layout]
    if name == "linears1":
        q, sx = torch.ops.ternc.quantize_act(x, 8)
        held = [v.weight, v.scale, None, None]
        return [q, sx, *held, torch.randn(3, 2, 40), 40, 0, 8, v.layout, dtype]
    if name.startswith("token_linears"):
        ws = [v, w, w, v][: int(name[-1])]
        return list(token_arguments(x, ws, "layer", "gelu_tanh" if len(ws) == 1 else "", bias=True))
    if name.startswith("linears"):
        n, none = int(name[-1]), torch.empty(0)
        ws = [w, v, w, v][:n]
        multipliers = [none.byte() if p.multiplier is None else p.multiplier for p in ws]
        lists = [[p.weight for p in ws], [p.scale for p in ws], multipliers]
        sizes = [[p.shape[0] for p in ws], [p.group_size for p in ws]]
        biases = [bias, none, none, none][:n]
        return [x, None, *lists, biases, *sizes, 8, [p.layout for p in ws], dtype]
    signs = (torch.randint(0, 2, (64,)) * 2 - 1).to(torch.int8)
    table = [torch.randint(0, 96, (3, 5)), w.weight, w.scale, w.multiplier]
    return {
        "norm_quantize": [x, torch.randn(64), None, "layer", 1e-5, 0.5, True, signs, 64, 8, True],
        "activate_quantize": [x, torch.randn(3, 2, 64), "gelu_tanh", None, 0, 8],
        "hadamard": [x, signs, 32],
        "attention": [
            torch.randn(2, 4, 3, 8),
            *torch.randn(2, 2, 2, 70, 8),
            0.25,
            True,
            torch.arange(70)[None] % 3 < 2,
        ],
        "quantize_act": [x, 8],
        "embedding": [*table, 96, 64, w.group_size, w.layout, torch.bfloat16],
    }[name]


class Slots:
    """Arguments as `void*` each; keeps alive what they point to."""

    def __init__(self):
        self.held, self.pointers = [], []

    def add(self, pointer, *held):
        self.held.extend((pointer, *held))
        self.pointers.append(ctypes.cast(pointer, ctypes.c_void_p))

    def number(self, c_type, value):
        place = c_type(value)
        self.add(ctypes.pointer(place), place)

    def argument(self, kind, value):
        if kind == "Tensor":
            self.add(ctypes.c_void_p(handle(value)))
        elif kind == "Optional[Tensor]":
            place = None if value is None else ctypes.pointer(ctypes.c_void_p(handle(value)))
            self.add(place)
        elif kind.startswith("List"):
            tensors = kind == "List[Tensor]"
            values = [handle(v) for v in value] if tensors else value
            item = ctypes.c_void_p if tensors else ctypes.c_int64
            self.add((item * len(values))(*values))
            self.number(ctypes.c_int64, len(values))
        elif kind == "str":
            self.add(ctypes.c_char_p(value.encode()))
        elif kind == "ScalarType":
            self.number(ctypes.c_int32, {torch.float32: 6, torch.bfloat16: 15}[value])
        else:
            types = {"int": ctypes.c_int64, "float": ctypes.c_double, "bool": ctypes.c_int32}
            self.number(types[kind], value)


def handle(tensor):
    """Address of an at::Tensor that shares `tensor`; never freed, tests are short."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)


def taken(address):
    """The tensor that an entry left at this address."""
    wrap = ctypes.pythonapi.PyCapsule_New
    wrap.restype = ctypes.py_object
    wrap.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(wrap(address, None, None))


@pytest.mark.parametrize("name", cpu.ENTRIES)
def test_an_entry_gives_what_the_dispatcher_gives(name):
    op = getattr(torch.ops.ternc, name).default
    given = arguments(name)
    expected = op(*given)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    slots = Slots()
    for argument, value in zip(op._schema.arguments, given, strict=True):
        slots.argument(str(argument.real_type), value)
    results = [ctypes.c_void_p() for _ in expected]
    for place in results:
        slots.add(ctypes.pointer(place), place)
    entry = getattr(ctypes.CDLL(cpu.load()), f"ternc_entry_{name}")
    entry.restype = None
    entry((ctypes.c_void_p * len(slots.pointers))(*slots.pointers))
    for place, wanted in zip(results, expected, strict=True):
        actual = taken(place.value)
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)


@pytest.mark.parametrize("at", [2, 4, 9])
def test_a_list_of_more_weights_than_a_call_takes_is_refused_and_all_is_freed(at):
    given = arguments("linears4")
    given[at] = [given[at][0]] * 5
    lists = [g if isinstance(g, list) else [g] for g in given]
    held = [t for items in lists for t in items if isinstance(t, torch.Tensor)]
    counts = [t._use_count() for t in held]
    with pytest.raises(RuntimeError, match="a list of 5 for at most 4 weights"):
        torch.ops.ternc.linears4(*given)
    assert [t._use_count() for t in held] == counts


def test_every_entry_is_declared_once_with_a_type_for_each_argument():
    texts = entries.inductor_settings()["aot_inductor.custom_ops_to_c_shims"]
    assert {op._schema.name for op in texts} == {f"ternc::{name}" for name in cpu.ENTRIES}
    whole = "\n".join(text for parts in texts.values() for text in parts)
    assert whole.count("#include <dlfcn.h>") == 1
    for name in cpu.ENTRIES:
        assert whole.count(f"aoti_torch_cpu_{name}(") == 1


def test_declarations_can_be_pickled_and_copied_for_inductors_caches():
    texts = entries.inductor_settings()["aot_inductor.custom_ops_to_c_shims"]
    assert pickle.loads(pickle.dumps(texts)) == texts == copy.deepcopy(texts)
