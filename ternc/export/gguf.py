"""Packed language model -> a GGUF file for llama.cpp. Needs the package `gguf`.

Names and metadata are those of llama.cpp's own architectures, by the table
gguf_architectures.json: "pairs" are projections whose rows go from halves of a head (the order of
rotary embeddings in transformers) to pairs. llama.cpp quantises activations by itself, in blocks.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternc.errors import (
    ConfigError,
    MissingExtraError,
    UnsupportedModelError,
    WeightShapeError,
)
from ternc.export import gguf_tokenizer
from ternc.export.blocks import TRITS, blocks_of, to_bytes
from ternc.export.weights import packed_layers, weights
from ternc.formats.quantized import Quantized

TARGET = "llama.cpp"
TABLE = Path(__file__).with_name("gguf_architectures.json")


def write(
    model: nn.Module,
    path: Path,
    *,
    tokenizer: Any = None,
    trits: str = "TQ2_0",
    round_scales: bool = False,
) -> dict[str, Any]:
    """Writes one file.

    Args:
        tokenizer: fast tokenizer of transformers, byte-level BPE; None: llama.cpp gets token ids.
        trits: type of weights of one plane: TQ2_0, or TQ1_0 in fewer bytes.
        round_scales: scales may be rounded to fp16 (by at most 1 part in 2,048) where a smaller
            type then holds a weight. Otherwise every value in the file is exact.

    Raises:
        MissingExtraError: gguf is not installed.
        UnsupportedModelError: an architecture that is not in the table, a kind of rotary
        embedding or a tokenizer that the file cannot tell.
        WeightShapeError: no type holds a packed weight.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "writing a GGUF file") from error
    if trits not in TRITS:
        raise ConfigError(f"trits={trits!r} is not one of {', '.join(TRITS)}")
    known = _architecture(model)
    config: Any = model.config
    layers = packed_layers(model, TARGET)
    writer = gguf.GGUFWriter(path, known["architecture"], use_temp_file=False)
    _describe(writer, config)
    gguf_tokenizer.describe(writer, tokenizer, config.vocab_size)
    number = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == known["architecture"])
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    head = _head(config)
    counts: collections.Counter[str] = collections.Counter()
    rounded = 0
    for theirs, value in weights(model, layers):
        if config.tie_word_embeddings and theirs == _tied_head(model):
            continue
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"{theirs}: {TARGET}'s architecture {known['architecture']!r} has no such weight"
            )
        if any(f".{part}." in name for part in known.get("pairs", ())):
            value = _in_pairs(value, head)
        if isinstance(value, Quantized):
            blocks = blocks_of(value, trits, round_scales)
            if blocks is None:
                raise _no_type(theirs, value, round_scales)
            kind, stored, rounded = blocks.type.name, to_bytes(blocks), rounded + (not blocks.exact)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            kind = _add_float(writer, name, value)
        counts[kind] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "bytes": path.stat().st_size,
        "architecture": known["architecture"],
        "tensors": dict(sorted(counts.items())),
        "rounded_scales": rounded,
    }


def _architecture(model: nn.Module) -> dict[str, Any]:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    head = getattr(model, "get_output_embeddings", None)
    if kind not in table or not callable(head) or head() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {kind!r}) has no known form in {TARGET}; known "
            f"are language models of the types {', '.join(table)}"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    for name, seen, wanted in (
        ("rope_type", rotary.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rotary.get("partial_rotary_factor", 1.0), 1.0),
        ("hidden_act", config.hidden_act, "silu"),
        ("sliding_window", window >= config.max_position_embeddings, True),
    ):
        if seen != wanted:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name} of its config is not one that the file can tell "
                f"{TARGET}; written are rope_type 'default' of whole heads, 'silu', no window "
                "shorter than max_position_embeddings"
            )
    return table[kind]


def _describe(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _head(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _tied_head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _in_pairs(value: Quantized | torch.Tensor, head: int) -> Quantized | torch.Tensor:
    """Rows of every head from halves to pairs."""
    rows = value.shape[0]
    order = torch.arange(rows).view(-1, 2, head // 2).transpose(1, 2).reshape(-1)
    if isinstance(value, torch.Tensor):
        return value[order]
    multiplier, scale = value.multiplier, value.scale
    return Quantized(
        codes=value.codes[order],
        scale=scale[order] if scale.shape[0] == rows else scale,
        multiplier=None if multiplier is None else multiplier[order],
        group_size=value.group_size,
        planes=value.planes,
    )


def _add_float(writer: Any, name: str, value: torch.Tensor) -> str:
    """Vectors as fp32, as llama.cpp wants them; matrices in the smallest type that is exact."""
    import gguf

    value = value.detach().float().cpu().contiguous()
    half = value.dim() > 1 and torch.equal(value.half().float(), value)
    if not half and value.dim() > 1 and torch.equal(value.bfloat16().float(), value):
        stored = value.bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        return "BF16"
    writer.add_tensor(name, (value.half() if half else value).numpy())
    return "F16" if half else "F32"


def _no_type(name: str, value: Quantized, round_scales: bool) -> WeightShapeError:
    columns = value.shape[1]
    do = "rows need a multiple of 32 columns; leave the layer out with exclude="
    if value.planewise:
        do = "its planes have scales of their own; quantize with tie_scales=True"
    elif columns % 32 == 0:
        do = "its scales are no fp16 numbers; "
        do += (
            "leave it out with exclude=" if round_scales else "let them be rounded: --round-scales"
        )
    return WeightShapeError(
        f"{name}: no GGUF type holds {value.describe()} with {columns} columns: {do}"
    )
