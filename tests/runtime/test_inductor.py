"""What ternc asks of Inductor, by mode, device and the user's settings."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ternc.runtime import cpu, ops
from ternc.runtime.inductor import inner_compiler

ops.register()


def asked(monkeypatch, mode=None, settings=None, inputs=None):
    """The settings that reach `compile_fx`; nothing is compiled."""
    found = {}

    def record(gm, inputs, config_patches, decompositions):
        found.update(config_patches)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    gm = fx.symbolic_trace(torch.nn.Identity())
    inner_compiler("inductor", mode, settings or {})(
        gm, [torch.ones(2)] if inputs is None else inputs
    )
    return found


@torch.no_grad()
@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_who_waits_for_the_best_code_gets_calls_from_cpp(monkeypatch, mode):
    assert asked(monkeypatch, mode)["cpp_wrapper"] is True
    with torch.enable_grad():
        assert "cpp_wrapper" not in asked(monkeypatch, mode)


@torch.no_grad()
def test_nobody_else_does_unasked(monkeypatch):
    assert "cpp_wrapper" not in asked(monkeypatch)
    assert "cpp_wrapper" not in asked(monkeypatch, "reduce-overhead")
    assert asked(monkeypatch, settings={"cpp_wrapper": True})["cpp_wrapper"] is True


@torch.no_grad()
def test_settings_of_the_user_win(monkeypatch):
    assert asked(monkeypatch)["size_asserts"] is False
    assert asked(monkeypatch, settings={"size_asserts": True})["size_asserts"] is True


@torch.no_grad()
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_no_cuda_graph_is_tried_on_the_cpu(monkeypatch, mode):
    """Inductor warns of each one that it then cannot make."""
    assert asked(monkeypatch, mode)["triton.cudagraphs"] is False
    elsewhere = [torch.ones(2, device="meta")]
    assert asked(monkeypatch, mode, inputs=elsewhere)["triton.cudagraphs"] is True


@torch.no_grad()
def test_the_processors_settings_stay_there(monkeypatch):
    elsewhere = [torch.ones(2), torch.ones(2, device="meta")]
    assert (
        asked(monkeypatch, "max-autotune", inputs=elsewhere)
        .keys()
        .isdisjoint({"cpp_wrapper", "size_asserts", "aot_inductor.custom_ops_to_c_shims"})
    )


@torch.no_grad()
@pytest.mark.skipif(cpu.isa() is None, reason="no C++ library here")
def test_entry_points_are_declared_where_there_is_a_library(monkeypatch):
    declared = asked(monkeypatch)["aot_inductor.custom_ops_to_c_shims"]
    assert torch.ops.ternc.linears1.default in declared
