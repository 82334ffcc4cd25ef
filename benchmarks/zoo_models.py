"""Small random-weight models of many architectures, and inputs for them: name -> layers -> (model,
inputs).

Sizes are the least that exercise a block twice. transformers builds its models from configurations
alone; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, VOCABULARY, TOKENS = 64, 4, 2, 128, 12

Built = tuple[nn.Module, dict[str, torch.Tensor]]

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, TOKENS))}


_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
)


def _from(config: str, model: str, inputs: Callable[[], dict[str, torch.Tensor]], **sizes: Any):
    def build(layers: int = LAYERS) -> Built:
        import transformers

        given = {k: layers if k in _LAYER_COUNTS else v for k, v in sizes.items()}
        built = getattr(transformers, model)(getattr(transformers, config)(**given))
        return built, inputs()

    return build


def _decoder(family: str, **more: Any):
    return _from(f"{family}Config", f"{family}ForCausalLM", _ids, **{**_DECODER, **more})


def _pixels(size: int = 32) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


class NanoAttention(nn.Module):
    """Attention as people write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / (c // HEADS) ** 0.5)
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Nano(nn.Module):
    """Hand-written decoder: learned positions, pre-norm, GELU, tied head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers + 1))
        self.attention = nn.ModuleList(NanoAttention() for _ in range(layers))
        self.fc = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(layers))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for i in range(len(self.fc)):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.out[i](F.gelu(self.fc[i](self.norms[2 * i + 1](x))))
        return self.lm_head(self.norms[-1](x))


class TorchTransformer(nn.Module):
    """torch.nn's own encoder-decoder."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, HEADS, layers, layers, 96, dropout=0.0, batch_first=True
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        return self.transformer(x, x)


def _module(model: Callable[[int], nn.Module]) -> Callable[..., Built]:
    return lambda layers=LAYERS: (model(layers), _ids())


_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 32,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _pairs() -> dict[str, torch.Tensor]:
    return {**_ids(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, TOKENS))}


ZOO: dict[str, Callable[..., Built]] = {
    "llama": _decoder("Llama"),
    "mistral (sliding window)": _decoder("Mistral", sliding_window=6),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "gemma": _decoder("Gemma", head_dim=16),
    "gemma2": _decoder("Gemma2", head_dim=16),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3"),
    "stablelm": _decoder("StableLm"),
    "olmo2": _decoder("Olmo2"),
    "granite": _decoder("Granite"),
    "gpt_neox": _from(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _ids,
        **{k: v for k, v in _DECODER.items() if k != "num_key_value_heads"},
    ),
    "gpt2 (Conv1D)": _from(
        "GPT2Config",
        "GPT2LMHeadModel",
        _ids,
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _from(
        "OPTConfig",
        "OPTForCausalLM",
        _ids,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bloom (ALiBi)": _from(
        "BloomConfig",
        "BloomForCausalLM",
        _ids,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral (experts)": _decoder("Mixtral", num_local_experts=4),
    "qwen2_moe (experts)": _decoder(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "llama4 (experts, bmm)": _from(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _ids,
        **_DECODER,
        intermediate_size_mlp=96,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        head_dim=16,
    ),
    "gpt_oss (experts, sinks)": _decoder("GptOss", num_local_experts=4, head_dim=16),
    "bert": _from("BertConfig", "BertModel", _ids, **_ENCODER),
    "roberta": _from("RobertaConfig", "RobertaModel", _ids, **_ENCODER),
    "distilbert": _from(
        "DistilBertConfig",
        "DistilBertModel",
        _ids,
        vocab_size=VOCABULARY,
        dim=WIDTH,
        hidden_dim=96,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
    "electra": _from("ElectraConfig", "ElectraModel", _ids, embedding_size=WIDTH, **_ENCODER),
    "modernbert": _from(
        "ModernBertConfig",
        "ModernBertModel",
        _ids,
        **{**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": _from(
        "T5Config",
        "T5ForConditionalGeneration",
        _pairs,
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=16,
        d_ff=96,
        num_layers=LAYERS,
        num_heads=HEADS,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "bart": _from("BartConfig", "BartModel", _pairs, **_SEQ2SEQ),
    "vit": _from("ViTConfig", "ViTModel", _pixels(), **_VISION),
    "dinov2": _from("Dinov2Config", "Dinov2Model", _pixels(), mlp_ratio=2, **_VISION),
    "siglip (vision)": _from("SiglipVisionConfig", "SiglipVisionModel", _pixels(), **_VISION),
    "whisper (speech)": _from(
        "WhisperConfig",
        "WhisperModel",
        lambda: {
            "input_features": torch.randn(2, 16, 32),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (2, TOKENS)),
        },
        **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=32,
    ),
    "wav2vec2 (speech)": _from(
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        lambda: {"input_values": torch.randn(2, 800)},
        **{k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"},
        conv_dim=(32, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    ),
    "nanoGPT style": _module(Nano),
    "torch.nn.Transformer": _module(TorchTransformer),
}
