"""The decoders of decoders.py as GGUF files for llama.cpp, with the logits that they must give.

    python benchmarks/gguf_models.py FOLDER --shapes gpt2-small

Linear weights in TQ2_0 or Q4_0, embedding and head in Q8_0 (llama.cpp's nearest to an int8 head),
the rest in fp32. Needs the package `gguf`, and ggml's libraries to quantise with (ggml.py). The
logits are of the weights as the file rounds them (Q4_0 gives -1, 0, 1 as -1, 0, 7/8), and for
BitNet of SiLU, which llama.cpp has where transformers has a squared ReLU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import decoders  # noqa: E402
import ggml  # noqa: E402

KINDS = ("TQ2_0", "Q4_0")
PROBE = 16
"""Tokens of the prompt whose last logits are kept."""
ARCHITECTURES = {"gpt2-small": "gpt2", "llama-1.1b": "llama", "bitnet-2b4t": "bitnet"}
TABLES = ("token_embd.weight", "output.weight")
RENAMED = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
"""Names of transformers' BitNet -> those that the package `gguf` knows."""


def path_of(folder: Path, shape: str, kind: str) -> Path:
    return folder / f"{shape}-{kind}.gguf"


def logits_of(folder: Path, shape: str, kind: str) -> Path:
    return folder / f"{shape}-{kind}.logits"


def write(model: torch.nn.Module, shape: str, kind: str, path: Path) -> None:
    """One file; weights are read and written one by one."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape], use_temp_file=False)
    _describe(writer, config, shape)
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == writer.arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for theirs, tensor in model.state_dict().items():
        if tied and theirs == "lm_head.weight":
            continue
        for new, known in RENAMED.items():
            theirs = theirs.replace(new, known)
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        if writer.arch == "gpt2" and tensor.dim() == 2 and "blk." in name:
            tensor = tensor.T  # transformers' Conv1D is [in, out]
        if writer.arch == "llama" and ("attn_q." in name or "attn_k." in name):
            tensor = _interleaved(tensor, config.hidden_size // config.num_attention_heads)
        _add(writer, name, tensor.float().contiguous(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any, shape: str) -> None:
    head = config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if ARCHITECTURES[shape] == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _interleaved(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of a head from halves (transformers' rotary order) to pairs (llama.cpp's for Llama)."""
    rows, columns = weight.shape
    halves = weight.reshape(rows // head, 2, head // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _add(writer: Any, name: str, tensor: torch.Tensor, kind: str) -> None:
    import gguf

    if tensor.dim() == 1 or name.startswith("position_embd"):
        writer.add_tensor(name, tensor.numpy())
        return
    kind = "Q8_0" if name in TABLES else kind
    raw = gguf.GGMLQuantizationType(ggml.TYPES[kind])
    writer.add_tensor(name, _stored(tensor, kind).numpy(), raw_dtype=raw)


def _stored(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """fp32 [rows, columns] -> its blocks as bytes [rows, bytes of a row]."""
    rows, columns = tensor.shape
    library, number = ggml.library(), ggml.TYPES[kind]
    assert library is not None, "ggml's libraries are not here"
    stored = torch.empty(rows, library.row_size(number, columns), dtype=torch.uint8)
    library.quantize_chunk(number, tensor.data_ptr(), stored.data_ptr(), 0, rows, columns, None)
    return stored


def round_weights(model: torch.nn.Module, kind: str) -> None:
    """Linear weights, the head's apart, become what a file of this kind holds; in place."""
    import gguf

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    raw = gguf.GGMLQuantizationType(ggml.TYPES[kind])
    for module in model.modules():
        if not decoders.is_product(module) or module is head:
            continue
        weight: Any = module.weight.T if hasattr(module, "nf") else module.weight
        stored = _stored(weight.float().contiguous(), kind)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored.numpy(), raw)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=decoders.SHAPES, default=["gpt2-small"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        with torch.inference_mode():
            model = decoders.build(shape, torch.bfloat16, ternary=True)
            for module in model.modules():
                if ARCHITECTURES[shape] == "bitnet" and hasattr(module, "act_fn"):
                    module.act_fn = torch.nn.SiLU()
            ids = torch.tensor([decoders.prompt(PROBE)])
            for kind in sorted(options.kinds, key=KINDS.index):  # TQ2_0 holds ternary weights whole
                path = path_of(options.folder, shape, kind)
                write(model, shape, kind, path)
                round_weights(model, kind)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
                torch.save(logits[0, -1].float(), logits_of(options.folder, shape, kind))
                print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
