"""Published policies by name: rules in the words of a config's `plan.rules`, which they follow.

Sources are the cards of the checkpoints that were published with them:
`gsq2` mgoin/Qwen3.6-35B-A3B-2Bit-GSQ-ct, `config-i` thetom-ai/Qwen3.6-35B-A3B-ConfigI-MLX,
`apex2` varjosoft/Qwen3.6-35B-A3B-TQ-apex2, `jangtq2` JANGQ-AI/Qwen3.6-35B-A3B-JANGTQ,
`tq3` varjosoft/Qwen3.6-27B-TQ3-native. docs/config.md says where ours differ in size.
"""

from __future__ import annotations

AFFINE = {"codebook": "affine", "group_size": 64}
TQ = {"codebook": "tq", "group_size": 128}
PER_HEAD = r"in_proj_[ab]\."  # projections of linear attention that have one row per head

PRESETS: dict[str, list[dict]] = {
    # Routed experts at 2 bits, for Humming.
    "gsq2": [{"role": "expert", "bits": 2, "group_size": 128}],
    # By role and depth, for MLX. The card has no row for the shared expert; like the routed ones gives its 3.613 bits.
    "config-i": [
        {"role": "router", "keep": True},
        {"layers": ["first 2", "last 2"], "bits": 8, **AFFINE},
        {"role": ["expert gate up", "shared expert gate up"], "bits": 2, **AFFINE},
        {"role": ["expert down", "shared expert down"], "bits": 3, **AFFINE},
        {"role": ["attention", "linear attention"], "bits": 4, **AFFINE},
        {"role": ["embedding", "head"], "bits": 8, **AFFINE},
    ],
    # 3 and 4 bits by role and kurtosis, for TQ.
    "apex2": [
        {"role": ["router", "linear attention out"], "keep": True},
        {"role": "linear attention in", "match": PER_HEAD, "keep": True},
        {"role": ["expert down", "shared expert"], "bits": 4, **TQ},
        {"role": "attention", "bits": 4, **TQ},
        {"role": ["expert gate up", "linear attention in"], "bits": "kurtosis", **TQ},
    ],
    # Routed experts at 2 bits; the format itself stores the rest in 8 or 16.
    "jangtq2": [{"role": "expert", "codebook": "jangtq", "bits": 2}],
    # All large Linears of the decoder at 3 bits, for TQ.
    "tq3": [
        {"role": "router", "keep": True},
        {"role": "linear attention in", "match": PER_HEAD, "keep": True},
        {"role": ["attention", "linear attention", "mlp", "expert", "shared expert"], "bits": 3, **TQ},
    ],
}
