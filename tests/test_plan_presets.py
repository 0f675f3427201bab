"""Presets on the models they were published for, built from the architecture alone: tables, counts and sizes."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from gsq.config import Plan as Settings
from gsq.config import load_config
from gsq.errors import UserError
from gsq.export import jangtq
from gsq.export.base import check_plan, stored_bytes
from gsq.model.checkpoint import Checkpoint, TensorInfo
from gsq.model.skeleton import Skeleton
from gsq.model.targets import EXPERT_PARTS
from gsq.plan.presets import PRESETS
from gsq.plan.roles import Role
from gsq.plan.rules import Plan, PlanEntry, candidates, make_plan

ROOT = Path(__file__).parent.parent
GB = 1e9
SIDE_FILES = 0.025 * GB  # at most, of what the cards count with the weights: tokenizer and vocabulary
KURTOSIS = 3.4  # mean of the routed experts, on the card of apex2

VISION = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
}  # fmt: skip
SHARED = {
    "vocab_size": 248_320, "head_dim": 256, "tie_word_embeddings": False, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MOE = {  # Qwen/Qwen3.6-35B-A3B
    "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
    "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
DENSE = {  # Qwen/Qwen3.6-27B
    "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4,
    "linear_num_value_heads": 48, "intermediate_size": 17_408,
}  # fmt: skip


def skeleton_of(architecture: str, model_type: str, text: dict) -> Skeleton:
    """A model whose checkpoint has names and shapes, and no weights."""
    config = {
        "architectures": [architecture], "model_type": model_type, "tie_word_embeddings": False,
        "text_config": SHARED | text, "vision_config": VISION | {"out_hidden_size": text["hidden_size"]},
    }  # fmt: skip
    skeleton = Skeleton(Checkpoint(Path("model"), config, {}), torch.device("cpu"), torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.model.named_parameters()}
    shapes |= mtp_shapes(shapes, text["hidden_size"], text["num_hidden_layers"] - 1)
    for name, shape in shapes.items():
        skeleton.checkpoint.tensors[name] = TensorInfo(Path("weights"), torch.bfloat16, shape)
    return skeleton


def mtp_shapes(shapes: dict[str, tuple[int, ...]], hidden: int, last: int) -> dict[str, tuple[int, ...]]:
    """The block of multi-token prediction, which transformers does not load: like the `last` layer, and some more."""
    prefix = f"model.language_model.layers.{last}."
    block = {"mtp.layers.0." + name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)}
    norms = dict.fromkeys(
        [f"mtp.{name}.weight" for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")], (hidden,)
    )
    return block | norms | {"mtp.fc.weight": (hidden, 2 * hidden)}


@pytest.fixture(scope="module")
def moe() -> Skeleton:
    return skeleton_of("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", MOE)


@pytest.fixture(scope="module")
def dense() -> Skeleton:
    return skeleton_of("Qwen3_5ForConditionalGeneration", "qwen3_5", DENSE)


def plan_of(skeleton: Skeleton, preset: str) -> Plan:
    rules = Settings(preset=preset).all_rules
    return make_plan(skeleton, rules, dict.fromkeys(candidates(skeleton, rules), KURTOSIS))


def stored_plan(skeleton: Skeleton, preset: str, format: str) -> Plan:
    plan = plan_of(skeleton, preset)
    return plan.priced(stored_bytes(format, skeleton.checkpoint, plan.entries))


def table(plan: Plan) -> dict[str, str]:
    """For each role how many tensors are stored how, such as `36 x 2 g64, 4 x 8 g64`."""
    stored: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in plan.entries.values():
        book = entry.codebook
        stored[entry.role]["keep" if book is None else f"{book.bits} g{book.group_size}"] += 1
    return {role: ", ".join(f"{counts[how]} x {how}" for how in sorted(counts)) for role, counts in stored.items()}


def size(entries: Iterable[PlanEntry], *families: str) -> int:
    """Bytes of all that is planned, or of these families of roles."""
    return sum(e.bytes_after for e in entries if not families or Role.read(e.role).family in families)


# The tables


KEPT = {"embedding": "1 x keep", "head": "1 x keep", "vision": "333 x keep"}
MOE_KEPT = KEPT | {"router": "80 x keep", "norm": "131 x keep", "mtp": "19 x keep"}
MOE_KEPT |= {"convolution": "30 x keep", "linear attention": "60 x keep"}
MOE_KEPT |= {f"shared expert {part}": "40 x keep" for part in ("gate", "up", "down")}
MOE_KEPT |= {"linear attention in": "120 x keep", "linear attention out": "30 x keep"}
MOE_KEPT |= {f"attention {part}": "10 x keep" for part in "qkvo"}
DENSE_KEPT = KEPT | {"norm": "209 x keep", "mtp": "15 x keep"}
DENSE_KEPT |= {"convolution": "48 x keep", "linear attention": "96 x keep"}
TABLES = {
    "gsq2": MOE_KEPT | {"expert gate up": "40 x 2 g128", "expert down": "40 x 2 g128"},
    "jangtq2": MOE_KEPT | {"expert gate up": "40 x 2 g2048", "expert down": "40 x 2 g512"},  # groups are rows
    "config-i": MOE_KEPT
    | {"expert gate up": "36 x 2 g64, 4 x 8 g64", "expert down": "36 x 3 g64, 4 x 8 g64"}
    | {f"shared expert {part}": "36 x 2 g64, 4 x 8 g64" for part in ("gate", "up")}
    | {"shared expert down": "36 x 3 g64, 4 x 8 g64"}
    | {f"attention {part}": "9 x 4 g64, 1 x 8 g64" for part in "qkvo"}
    | {"linear attention in": "108 x 4 g64, 12 x 8 g64", "linear attention out": "27 x 4 g64, 3 x 8 g64"}
    | {"embedding": "1 x 8 g64", "head": "1 x 8 g64"},
    "apex2": MOE_KEPT
    | {"expert gate up": "40 x 3 g128", "expert down": "40 x 4 g128", "linear attention in": "60 x 3 g128, 60 x keep"}
    | {f"shared expert {part}": "40 x 4 g128" for part in ("gate", "up", "down")}
    | {f"attention {part}": "10 x 4 g128" for part in "qkvo"},
    "tq3": MOE_KEPT
    | {"expert gate up": "40 x 3 g128", "expert down": "40 x 3 g128"}
    | {f"shared expert {part}": "40 x 3 g128" for part in ("gate", "up", "down")}
    | {f"attention {part}": "10 x 3 g128" for part in "qkvo"}
    | {"linear attention in": "60 x 3 g128, 60 x keep", "linear attention out": "30 x 3 g128"},
}
DENSE_TABLES = {
    "tq3": DENSE_KEPT
    | {f"mlp {part}": "64 x 3 g128" for part in ("gate", "up", "down")}
    | {f"attention {part}": "16 x 3 g128" for part in "qkvo"}
    | {"linear attention in": "96 x 3 g128, 96 x keep", "linear attention out": "48 x 3 g128"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_makes_of_the_mixture_of_experts(preset: str, moe: Skeleton):
    assert table(plan_of(moe, preset)) == TABLES[preset]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("qwen36_*.yaml")), ids=lambda path: path.stem)
def test_the_format_of_a_recipe_holds_its_preset(path: Path, moe: Skeleton, dense: Skeleton):
    config = load_config(path)
    skeleton = dense if "27B" in config.model.name else moe
    check_plan(config.export.format, skeleton.checkpoint, plan_of(skeleton, config.plan.preset).entries)


@pytest.mark.parametrize("preset", DENSE_TABLES)
def test_what_a_preset_makes_of_the_dense_model(preset: str, dense: Skeleton):
    assert table(plan_of(dense, preset)) == DENSE_TABLES[preset]


@pytest.mark.parametrize(
    ("preset", "lacks"),
    [
        ("gsq2", "expert"),
        ("jangtq2", "expert"),
        ("config-i", "expert gate up down, shared expert gate up down"),
        ("apex2", "expert down, shared expert"),
    ],
)
def test_a_preset_names_the_roles_that_a_model_lacks(preset: str, lacks: str, dense: Skeleton):
    with pytest.raises(
        UserError, match=f"preset '{preset}' is not for this model, which lacks its roles {lacks}; .*mlp"
    ):
        plan_of(dense, preset)


def test_rules_of_a_preset_all_decide(moe: Skeleton):
    for preset in PRESETS:
        decide = {entry.rule for entry in plan_of(moe, preset).entries.values()}
        assert {str(rule) for rule in Settings(preset=preset).all_rules} <= decide


# The sizes


def test_the_models_are_those_that_were_published(moe: Skeleton, dense: Skeleton):
    """Bytes and tensors of their indices; the cards of the mixture of experts speak of 72 GB."""
    assert round(dense.checkpoint.nbytes / GB, 2) == 55.56
    assert len(dense.checkpoint.tensors) == 850 + 333 + 15 + 1  # decoder and embedding, vision, MTP, head
    assert round(moe.checkpoint.nbytes / GB) == 72


def test_gsq2_has_the_published_size_without_mtp(moe: Skeleton):
    plan = stored_plan(moe, "gsq2", "humming")
    entries = plan.entries.values()
    assert plan.summary()["bits_per_quantized_weight"] == 2.125  # published as 2.13
    assert round(size(entries) / GB, 2) == 16.04
    assert round((size(entries) - size(entries, "mtp")) / GB, 2) == 14.35  # published as 14.4


def test_config_i_has_the_published_bits(moe: Skeleton):
    """3.613 bits per weight is of what mlx_lm stores, which has no place for vision tower and MTP."""
    plan = stored_plan(moe, "config-i", "mlx")
    summary = plan.summary()
    assert round(summary["bits_per_weight"], 3) == 3.613
    assert round(summary["bytes_after"] / GB, 2) == 15.65  # 14.6 GiB, published as 15 GB
    assert {entry.role for entry in plan.entries.values() if not entry.bytes_after} == {"vision", "mtp"}


def test_jangtq2_has_the_published_size_and_tensors(moe: Skeleton):
    """The format stores kept tensors in 8.5 or 16 bits, or not at all."""
    plan = stored_plan(moe, "jangtq2", "jangtq")
    nbytes = tensors = 0
    for entry in plan.entries.values():
        kind = jangtq.kind_of(entry.sources[0], entry.shape)
        if kind == "experts":
            parts = len(EXPERT_PARTS[entry.name.rpartition(".")[2]])
            nbytes, tensors = nbytes + entry.bytes_after, tensors + 3 * parts
        elif kind == "affine":
            nbytes, tensors = nbytes + entry.numel * (8 + 32 / 64) / 8, tensors + 3
        elif kind != "dropped":
            nbytes, tensors = nbytes + 2 * entry.numel, tensors + 1
    assert round(nbytes / GB, 2) == 11.63
    assert tensors == 1930
    assert plan.summary()["bytes_after"] == nbytes


def test_tq3_differs_from_the_published_size_by_what_we_keep(dense: Skeleton, moe: Skeleton):
    """The published checkpoints are packed throughout, vision tower and MTP included, as their sizes tell."""
    plans = [stored_plan(skeleton, "tq3", "tq") for skeleton in (dense, moe)]
    assert [round(plan.summary()["bytes_after"] / GB, 2) for plan in plans] == [16.79, 18.33]
    assert 0 < 15.37 * GB - packed_throughout(dense) < SIDE_FILES
    assert round(packed_throughout(moe) / GB) == 16  # all that its card says


def packed_throughout(skeleton: Skeleton) -> float:
    """Bytes of every matrix in TQ at 3 bits, except embeddings, head, norms and convolutions."""
    nbytes = 0.0
    for name, info in skeleton.checkpoint.tensors.items():
        matrix = (name.endswith(".weight") and len(info.shape) == 2) or "experts" in name
        if matrix and not re.search("head|embed|norm|conv1d", name):
            nbytes += math.prod(info.shape[:-1]) * math.ceil(info.shape[-1] / 128) * 128 * (3 + 32 / 128) / 8
        else:
            nbytes += info.nbytes
    return nbytes
