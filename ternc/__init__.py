"""ternc: the ternary compiler for PyTorch. `torch.compile(model, backend="ternc")`.

Importing this package does no work: every name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ternc.checkpoint import load, save
    from ternc.config import Config
    from ternc.inspection import explain, repack, report
    from ternc.modules.attention import TernaryMultiheadAttention
    from ternc.modules.embedding import TernaryEmbedding
    from ternc.modules.linear import TernaryLinear
    from ternc.quantization import quantize
    from ternc.reporting import Report
    from ternc.train.site import sites

__version__ = "0.1.0"

_HOME = {
    "Config": "ternc.config",
    "Report": "ternc.reporting",
    "TernaryEmbedding": "ternc.modules.embedding",
    "TernaryLinear": "ternc.modules.linear",
    "TernaryMultiheadAttention": "ternc.modules.attention",
    "explain": "ternc.inspection",
    "load": "ternc.checkpoint",
    "quantize": "ternc.quantization",
    "repack": "ternc.inspection",
    "report": "ternc.inspection",
    "save": "ternc.checkpoint",
    "sites": "ternc.train.site",
}

__all__ = [
    "Config",
    "Report",
    "TernaryEmbedding",
    "TernaryLinear",
    "TernaryMultiheadAttention",
    "explain",
    "load",
    "quantize",
    "repack",
    "report",
    "save",
    "sites",
]

_SUBPACKAGES = ("bitlinear", "bitnet_v3", "export", "train")
"""Reachable as attributes too: `ternc.train.Trainer`."""

# A source checkout keeps passes/, runtime/ and csrc/ beside ternc/, an installed package inside.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and not (_ROOT / "ternc" / "passes").exists():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ternc.{name}")
    raise AttributeError(f"module 'ternc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
