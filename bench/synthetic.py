"""Checkpoints of random weights: names, shapes and config of a published model, as many layers of it as asked for.

Weights are drawn as transformers initializes that architecture, one block of the model at a time, so
that a model far larger than memory can be written. For the programs beside this one that measure what
such a model costs; what they make of it in quality means nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast

from gsq.model.checkpoint import CheckpointWriter
from gsq.model.skeleton import build_meta_model

SHARD_BYTES = 1 << 30
INTERVAL = 4  # of Qwen3.5 and 3.6: every so many layers one has full attention
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Published:
    """A published model: its class, what its `config.json` says otherwise than transformers' defaults, its MTP block.

    `text` are the settings of the decoder, which a config may keep in a section of its own (`nested`).
    """

    architecture: str
    model_type: str
    text: dict = field(default_factory=dict)
    nested: bool = True
    mtp: bool = True  # weights of multi-token prediction, which transformers does not load
    recipe: str | None = None  # of configs/

    def config(self, layers: int | None = None, vision: int | None = None, **shrunk: int | None) -> dict:
        """`config.json` with this many decoder layers and vision blocks and other text settings; None: as published."""
        given = {"num_hidden_layers": layers, **shrunk}
        text = self.text | {key: value for key, value in given.items() if value is not None}
        settings = {"text_config": text} if self.nested else text
        if self.nested:  # the vision tower writes into the decoder's hidden states
            width = CONFIG_MAPPING[self.model_type](text_config=text).text_config.hidden_size
            settings["vision_config"] = {"out_hidden_size": width} | ({} if vision is None else {"depth": vision})
        full = CONFIG_MAPPING[self.model_type](**settings, tie_word_embeddings=False)
        named = {"architectures": [self.architecture], "dtype": "bfloat16"}
        return json.loads(full.to_json_string(use_diff=False)) | named


MODELS = {
    "Qwen3.6-35B-A3B": Published(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", recipe="qwen36_2bit.yaml",
    ),
    "Qwen3.6-27B": Published(
        "Qwen3_5ForConditionalGeneration", "qwen3_5", recipe="qwen36_27b_tq3.yaml",
        text={
            "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
            "num_key_value_heads": 4, "linear_num_value_heads": 48,
        },
    ),
    "Qwen3-8B": Published(
        "Qwen3ForCausalLM", "qwen3", nested=False, mtp=False,
        text={
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
    ),
}  # fmt: skip


def blocks(published: Published, config: dict) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Parts of the model `config` describes, on the meta device, each with its path and the model that initializes it.

    Blocks of its lists (decoder layers, those of the vision tower) come whole, other modules alone; last the block of
    multi-token prediction.
    """
    model = build_meta_model(config, torch.bfloat16)
    modules = dict(model.named_modules())
    lists = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    models = {path: module for path, module in modules.items() if isinstance(module, PreTrainedModel)}
    for path, module in modules.items():
        owners = set(_owners(path))
        model = models[max(owners & set(models), key=len)]  # the innermost
        if path.rpartition(".")[0] in lists:
            yield path, module, model
        elif not owners & lists:
            alone = copy.copy(module)
            alone._modules = {}
            yield path, alone, model
    if published.mtp:
        yield "mtp", *mtp_block(config)


def mtp_block(config: dict) -> tuple[nn.Module, PreTrainedModel]:
    """What predicts a token more: a decoder layer with full attention, norms, and a Linear that joins two inputs.

    With the model that initializes it.
    """
    text = config["text_config"] | {"num_hidden_layers": INTERVAL, "layer_types": None}
    decoder = build_meta_model(config | {"text_config": text}, torch.bfloat16).get_decoder()
    hidden = text["hidden_size"]
    with torch.device("meta"):
        block = nn.Module()
        block.fc = nn.Linear(2 * hidden, hidden, bias=False)
        block.layers = nn.ModuleList([decoder.layers[INTERVAL - 1]])
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            setattr(block, name, copy.deepcopy(decoder.norm))
    return block, decoder


def layout(published: Published, config: dict) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint by its name."""
    found = {}
    for path, block, _ in blocks(published, config):
        found |= {_join(path, name): tuple(parameter.shape) for name, parameter in block.named_parameters()}
    return found


def write_checkpoint(published: Published, config: dict, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint that `config` describes, in bfloat16, with a tokenizer; memory holds a block and a shard."""
    torch.manual_seed(seed)
    writer = CheckpointWriter(folder, SHARD_BYTES)
    for path, block, model in blocks(published, config):
        for name, tensor in drawn(block, model).items():
            writer.add(_join(path, name), tensor)
    writer.write_json("config.json", config)
    byte_tokenizer(config.get("text_config", config)["vocab_size"]).save_pretrained(writer.partial)
    return writer.finish()


def write_hollow(published: Published, config: dict, folder: Path) -> Path:
    """The same checkpoint with zeros for weights: files have holes, so that they take no room on a disk."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, (path, block, _) in enumerate(blocks(published, config)):
        header, end = {}, 0
        for name, parameter in block.named_parameters():
            start, end = end, end + 2 * parameter.numel()
            header[_join(path, name)] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
        if header:
            file = partial / f"block-{number:04}.safetensors"
            index |= dict.fromkeys(header, file.name)
            text = json.dumps(header).encode()
            with open(file, "wb") as shard:
                shard.write(len(text).to_bytes(8, "little") + text)
                shard.truncate(shard.tell() + end)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (partial / "config.json").write_text(json.dumps(config))
    byte_tokenizer(config.get("text_config", config)["vocab_size"]).save_pretrained(partial)
    return partial.rename(folder)


@torch.no_grad()
def drawn(block: nn.Module, model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a block that is on the meta device, as its `model` initializes them, by name inside the block."""
    real = copy.deepcopy(block).to_empty(device="cpu").bfloat16()
    for parameter in real.parameters():
        parameter.fill_(torch.nan)
    real.apply(model._init_weights)
    weights = {name: parameter.data for name, parameter in real.named_parameters()}
    forgotten = [name for name, weight in weights.items() if weight.sum().isnan()]
    if forgotten:
        raise ValueError(f"{type(model).__name__} does not initialize {forgotten[0]} of {type(block).__name__}")
    return weights


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token for each byte and one that ends a text; ids up to `vocab_size`, at least 257, are left unused."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    if vocab_size < len(words):
        raise ValueError(f"a vocabulary of {vocab_size} has no room for {len(words) - 1} bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _owners(path: str) -> Iterator[str]:
    """Paths of a module and of all that it is a part of, from the model's, which is empty."""
    parts = path.split(".") if path else []
    return (".".join(parts[:length]) for length in range(len(parts) + 1))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
