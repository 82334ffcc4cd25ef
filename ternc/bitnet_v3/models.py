"""A causal language model of ternary layers: token ids [B, T] -> logits [B, T, V].

Pre-norm blocks with RMSNorm, rotary positions, SwiGLU, fused attention, and a cache that decodes
one token at a time to what the whole sequence gives. Left and right padding by `attention_mask`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ternc
from ternc.bitnet_v3.utils import BitNetV3Config
from ternc.errors import CheckpointError, InputError
from ternc.modules.linear import TernaryLinear
from ternc.train import checkpoint
from ternc.train.preparation import prepare
from ternc.train.sharding import full
from ternc.train.site import final_quantizers

ARCHITECTURE = "ternc.bitnet_v3"
CONFIG_FILE = "config.json"

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, H, T, C] of every block."""


@dataclasses.dataclass
class ModelOutput:
    """What a call returns; indexing and iteration skip what is None."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order."""
        values = (self.loss, self.logits, self.past_key_values)
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


class Attention(nn.Module):
    """Causal self-attention: x [B, T, D], keys of the cache in front -> [B, T, D]."""

    def __init__(self, config: BitNetV3Config) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.dropout = config.dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *angles), rotate(k, *angles)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and length > 1,
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU: x [B, T, D] -> down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: BitNetV3Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        assert hidden is not None  # the configuration filled it in
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BitNetV3Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        y, kept = self.attention(self.attention_norm(x), angles, mask, past)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), kept


class BitNetV3Model(nn.Module):
    """The language model; its linears are trainable ternary layers from the start.

    Args:
        prepared: False leaves the layers floating point, as a teacher or a skeleton to load into.
    """

    def __init__(self, config: BitNetV3Config, prepared: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        depth = (2 * config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                inner = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=(depth if inner else 1) * parameter.shape[1] ** -0.5)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        if prepared:
            prepare(self, config.train_config(), inplace=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        return_dict: bool = True,
    ) -> ModelOutput | tuple[Any, ...]:
        """input_ids int64 [B, T] -> logits [B, T, V], and a loss where there are labels [B, T].

        Args:
            attention_mask: 1 for tokens, 0 for padding on either side, [B, past + T].
            labels: logits at t are scored on the label at t + 1; -100 is not scored.
            past_key_values: of an earlier call; `input_ids` are then the tokens after it.

        Raises:
            InputError: more positions than `max_position_embeddings`, or a mask of another size.
        """
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        total = past + input_ids.shape[1]
        if total > self.config.max_position_embeddings:
            raise InputError(
                f"{total} positions; max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (len(input_ids), total):
            raise InputError(
                f"attention_mask is {list(attention_mask.shape)}, wanted {[len(input_ids), total]}"
            )
        x = self.embeddings(input_ids)
        angles = self._angles(input_ids, attention_mask, past, x.dtype)
        mask = _mask(attention_mask, input_ids.shape[1], total, x.device)
        kept: Cache = []
        for index, block in enumerate(self.blocks):
            earlier = None if past_key_values is None else past_key_values[index]
            x, entry = block(x, angles, mask, earlier)
            kept.append(entry)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        output = ModelOutput(loss, logits, kept if use_cache else None)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int = 100,
        temperature: float = 1.0,
        do_sample: bool = False,
        attention_mask: torch.Tensor | None = None,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        max_new_tokens: int | None = None,
        use_cache: bool = True,
    ) -> torch.Tensor:
        """input_ids [B, T], padded on the left if at all -> [B, up to max_length] with new tokens.

        One token at a time with a cache, in eval mode and with the final quantisers.
        """
        training = self.training
        self.eval()
        count = max_length - input_ids.shape[1] if max_new_tokens is None else max_new_tokens
        ids = input_ids
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache: Cache | None = None
        with final_quantizers(self):
            for _ in range(count):
                step = ids if cache is None else ids[:, -1:]
                output = self(step, mask, past_key_values=cache, use_cache=use_cache)
                cache = output.past_key_values
                new = _pick(output.logits[:, -1].float(), temperature, do_sample, top_k)
                if eos_token_id is not None:
                    new = torch.where(done, eos_token_id, new)
                    done |= new == eos_token_id
                ids = torch.cat((ids, new[:, None]), 1)
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
                if bool(done.all()):
                    break
        self.train(training)
        return ids

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder: config.json, and the weights with the state of the schedule.

        A packed model is written by `ternc.save`, at 1.6 bits a trit.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if _is_packed(self):
            ternc.save(self, folder)
        else:
            tensors, aliases = checkpoint.model_state(self)
            whole = {name: full(tensor) for name, tensor in tensors.items()}
            checkpoint.save_tensors(folder / checkpoint.MODEL, whole)
            (folder / "aliases.json").write_text(json.dumps(aliases), encoding="utf-8")
        trained = hasattr(self, "_ternc_train_config")
        values = {"architecture": ARCHITECTURE, "prepared": trained, **self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> BitNetV3Model:
        """The model that `save_pretrained` wrote, bit for bit, at its place in the schedule.

        Raises:
            CheckpointError: no such folder, or one of another architecture.
        """
        folder = Path(path)
        try:
            values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
        if values.pop("architecture", None) != ARCHITECTURE:
            raise CheckpointError(f"{folder / CONFIG_FILE} is not of a {ARCHITECTURE} model")
        prepared = values.pop("prepared", True)
        packed = (folder / "ternc.json").is_file()
        model = cls(BitNetV3Config(**values), prepared=prepared and not packed)
        if packed:
            return ternc.load(folder, model=model)  # type: ignore[return-value]
        aliases = json.loads((folder / "aliases.json").read_text(encoding="utf-8"))
        stored = checkpoint.read_tensors(folder / checkpoint.MODEL)
        checkpoint.load_model_state(model, stored, aliases)
        return model

    def _angles(
        self, ids: torch.Tensor, mask: torch.Tensor | None, past: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B or 1, 1, T, C / 2]; padding on the left takes no positions."""
        if mask is None:
            position = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        else:
            position = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        width = self.config.hidden_size // self.config.num_heads
        step = torch.arange(0, width, 2, device=ids.device) / width
        angle = position[:, None, :, None] * self.config.rope_base**-step
        return angle.cos().to(dtype), angle.sin().to(dtype)


BitNetV3ForCausalLM = BitNetV3Model


def create_model(
    vocab_size: int = 32000,
    hidden_size: int = 2048,
    num_layers: int = 24,
    num_heads: int | None = None,
    **options: Any,
) -> BitNetV3Model:
    """A causal language model; `options` are the other fields of `BitNetV3Config`."""
    return BitNetV3Model(
        BitNetV3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads or max(1, hidden_size // 64),
            **options,
        )
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head [B, H, T, C] by the angle of its position."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


def _mask(
    mask: torch.Tensor | None, length: int, total: int, device: torch.device
) -> torch.Tensor | None:
    """Bool [B or 1, 1, T, total], or None where plain causal attention (or one token) will do.

    A padded query sees itself, so that no row is empty and nothing becomes NaN.
    """
    if mask is None and (length == total or length == 1):
        return None
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    causal = (key <= query)[None, None]
    if mask is None:
        return causal
    return (causal & mask.bool()[:, None, None]) | (key == query)


def _pick(
    logits: torch.Tensor, temperature: float, do_sample: bool, top_k: int | None
) -> torch.Tensor:
    """Logits [B, V] -> token ids [B]."""
    if not do_sample or temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, TernaryLinear) for module in model.modules())
