"""Tiny random models for tests, as checkpoints on disk: `folder = tiny_llama(tmp_path / "llama")`.

Every function takes a folder that does not exist yet, writes a bfloat16 checkpoint with a tokenizer
into it and returns it. Hidden size 64, vocabulary 128, seeded: the same call writes the same bytes.
Common keywords: `layers`, `seed`, `shards` (spread the tensors over at least so many files) and, for experts,
`fused` (True: one 3-D tensor per layer, as Qwen3.5 is published; False: a tensor per expert, as Qwen3).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gsq.model.checkpoint import CheckpointWriter
from gsq.model.targets import EXPERT_PARTS, expert_part_names

HIDDEN, VOCAB, EXPERTS, INTERMEDIATE, EXPERT_INTERMEDIATE = 64, 128, 4, 128, 64
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<vision>", "</vision>", "<image>", "<video>")
BYTE_LEVEL = {" ": "Ġ", "\n": "Ċ"}  # how byte-level tokenizers spell what is no visible character
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DENSE = {"intermediate_size": INTERMEDIATE}
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_INTERMEDIATE}
HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "num_position_embeddings": 16, "out_hidden_size": HIDDEN,
}  # fmt: skip
VISION_TOKENS = {"vision_start_token_id": 4, "vision_end_token_id": 5, "image_token_id": 6, "video_token_id": 7}


def tiny_llama(folder: Path, layers: int = 2, tied: bool = True, seed: int = 0, shards: int = 1) -> Path:
    """A dense Llama, embeddings tied to the head unless told otherwise."""
    config = LlamaConfig(**TEXT, **DENSE, num_hidden_layers=layers, tie_word_embeddings=tied)
    return _save(folder, _build(LlamaForCausalLM, config, seed), shards=shards)


def tiny_qwen3(folder: Path, layers: int = 2, seed: int = 0, shards: int = 1) -> Path:
    """A dense Qwen3: norms on queries and keys, its own head."""
    config = Qwen3Config(**TEXT, **DENSE, num_hidden_layers=layers, tie_word_embeddings=False)
    return _save(folder, _build(Qwen3ForCausalLM, config, seed), shards=shards)


def tiny_qwen3_moe(folder: Path, layers: int = 2, seed: int = 0, shards: int = 1, fused: bool = False) -> Path:
    """A Qwen3 of four experts, stored one by one as Qwen publishes it."""
    config = Qwen3MoeConfig(**TEXT, **DENSE, **MOE, num_hidden_layers=layers, tie_word_embeddings=False)
    return _save(folder, _build(Qwen3MoeForCausalLM, config, seed), shards=shards, fused=fused)


def tiny_qwen3_5(folder: Path, layers: int = 4, seed: int = 0, shards: int = 1) -> Path:
    """A dense Qwen3.5: three Gated DeltaNet layers to one of full attention, and a vision tower."""
    text = TEXT | DENSE | HYBRID | {"num_hidden_layers": layers, "layer_types": layer_types(layers)}
    config = Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=False, **VISION_TOKENS)
    return _save(folder, _build(Qwen3_5ForConditionalGeneration, config, seed), shards=shards)


def tiny_qwen3_5_moe(folder: Path, layers: int = 4, seed: int = 0, shards: int = 1, fused: bool = True) -> Path:
    """The flagship in small: hybrid attention, routed and shared experts, a vision tower, and `mtp.*` tensors."""
    text = TEXT | MOE | HYBRID | {"shared_expert_intermediate_size": EXPERT_INTERMEDIATE}
    text |= {"num_hidden_layers": layers, "layer_types": layer_types(layers)}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **VISION_TOKENS)
    model = _build(Qwen3_5MoeForConditionalGeneration, config, seed)
    return _save(folder, model, _mtp_tensors(model.state_dict(), layers), shards=shards, fused=fused)


def layer_types(layers: int) -> list[str]:
    """Every fourth layer has full attention, and so has the last one, so that two layers show both kinds."""
    full = {index for index in range(layers) if index % 4 == 3} | {layers - 1}
    return ["full_attention" if index in full else "linear_attention" for index in range(layers)]


def random_tokens(batch: int = 2, length: int = 32, seed: int = 0) -> Tensor:
    """Token ids `[batch, length]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), VOCAB, (batch, length), generator=generator)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; the vocabulary is filled up to 128.

    Byte-level, because some models' tokenizer classes insist on it and replace anything else.
    """
    words = [*SPECIALS, BYTE_LEVEL["\n"], *(BYTE_LEVEL.get(chr(code), chr(code)) for code in range(32, 127))]
    words += [f"<unused{index}>" for index in range(VOCAB - len(words))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _build(model_class: type, config, seed: int) -> torch.nn.Module:
    """A seeded model whose norms and other vectors are not all alike, so that mixing them up shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
    return model.to(torch.bfloat16)


def _mtp_tensors(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of a multi-token prediction block, which transformers does not load: the last layer's shapes."""
    prefix = f"model.language_model.layers.{layers - 1}."
    block = {"mtp.layers.0." + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if prefix in name}
    vectors = dict.fromkeys(["mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"], torch.empty(HIDDEN))
    block |= {name + ".weight": tensor for name, tensor in vectors.items()}
    block["mtp.fc.weight"] = torch.empty(HIDDEN, 2 * HIDDEN)
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(t.shape, generator=generator).mul(0.1).bfloat16() for name, t in sorted(block.items())}


def _save(
    folder: Path, model: torch.nn.Module, more: dict[str, Tensor] | None = None, shards: int = 1, fused: bool = True
) -> Path:
    tensors = model.state_dict() | (more or {})
    if model.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight")
    if not fused:
        tensors = dict(pair for name, tensor in tensors.items() for pair in _split_experts(name, tensor))
    size = sum(tensor.nbytes for tensor in tensors.values())
    writer = CheckpointWriter(folder, shard_bytes=size // shards + 1)
    for name, tensor in tensors.items():
        writer.add(name, tensor.clone())
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    writer.write_json("config.json", json.loads(model.config.to_json_string(use_diff=False)))
    tiny_tokenizer().save_pretrained(writer.partial)
    return writer.finish()


def _split_experts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A fused tensor `[experts, out, in]` as the 2-D tensors of its experts; others as they are."""
    if tensor.ndim != 3 or name.rpartition(".")[2] not in EXPERT_PARTS:
        return [(name, tensor)]
    names = expert_part_names(name, len(tensor))
    return [pair for row, expert in zip(names, tensor, strict=True) for pair in _name_parts(row, expert)]


def _name_parts(names: list[str], expert: Tensor) -> list[tuple[str, Tensor]]:
    return list(zip(names, expert.chunk(len(names)), strict=True))
