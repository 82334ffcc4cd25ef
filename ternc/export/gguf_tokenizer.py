"""A fast tokenizer of transformers -> the tokenizer of a GGUF file: byte-level BPE alone.

llama.cpp knows the ways to cut text into words by name; gguf_pretokenizers.json has the pattern of
each ("split", null for the one that is built in). A tokenizer that is none of them is refused:
llama.cpp would cut otherwise than the model learnt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ternc.errors import UnsupportedModelError

TABLE = Path(__file__).with_name("gguf_pretokenizers.json")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of a token, by llama.cpp's numbers."""

SPECIAL = ("bos", "eos", "unk", "pad")


def describe(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes tokens, merges and special tokens.

    Args:
        writer: gguf.GGUFWriter.
        tokenizer: fast tokenizer, or None: llama.cpp is then given token ids.
        size: rows of the embedding; ids that no token has are filled up.

    Raises:
        UnsupportedModelError: no byte-level BPE, an unknown way to cut text, more tokens than rows.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    parts = _parts(tokenizer)
    tokens: list[str] = [f"[UNUSED{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    own = [(content, index, NORMAL) for content, index in parts["model"]["vocab"].items()]
    for added in parts.get("added_tokens", ()):
        kind = CONTROL if added["special"] else USER_DEFINED
        own.append((added["content"], added["id"], kind))
    if (last := max(index for _, index, _ in own)) >= size:
        raise UnsupportedModelError(
            f"the tokenizer has a token {last} and the model's embedding {size} rows; give the "
            "folder the tokenizer that the model was trained with"
        )
    for content, index, kind in own:
        tokens[index], kinds[index] = content, kind
    merges = parts["model"]["merges"]
    cut = _cut(parts)
    writer.add_tokenizer_model(cut["model"])
    writer.add_tokenizer_pre(cut["name"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name in SPECIAL:
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that is written as it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = parts.get("model") or {}
    normal = (parts.get("normalizer") or {}).get("type")
    plain = not model.get("byte_fallback") and not model.get("continuing_subword_prefix")
    if model.get("type") != "BPE" or not plain or normal not in (None, "NFC"):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__}: its tokens are {model.get('type', 'of no known kind')!r} "
            f"after the normalizer {normal!r}; only byte-level BPE is written to GGUF files. Write "
            "the file without a tokenizer (--no-tokenizer) and give llama.cpp token ids"
        )
    return parts


def _cut(parts: dict[str, Any]) -> dict[str, str]:
    """The entry of the table: llama.cpp's names of the kind of tokenizer and of its cuts."""
    steps = parts.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    splits = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    levels = [s for s in steps if s.get("type") == "ByteLevel"]
    known = len(levels) == 1 and len(splits) < 2 and len(steps) == len(splits) + 1
    if known and not levels[0].get("add_prefix_space", True):
        split = splits[0] if splits else None
        if levels[0].get("use_regex", True) == (split is None):
            for entry in json.loads(TABLE.read_text(encoding="utf-8")):
                if entry["split"] == split:
                    return entry
    raise UnsupportedModelError(
        f"the tokenizer cuts text by {json.dumps(steps)[:200]}, of which llama.cpp's name is not "
        "known here; write the file without a tokenizer (--no-tokenizer)"
    )
