"""Conversion without calibration: nothing that is written depends on threads, pieces or their order."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from gsq.codebook import Codebook
from gsq.config import parse_config
from gsq.convert import Rounded, ahead, convert, threads
from gsq.model.checkpoint import Checkpoint
from gsq.plan.rules import Plan, PlanEntry

PROJECTIONS = r"layers\.\d+\.(mlp|self_attn)\..*_proj(\.weight)?$"
CASES = {  # model, format, rule
    "padded groups": (models.tiny_qwen3, "tq", {"codebook": "tq", "bits": 3, "group_size": 128}),
    "experts one by one": (models.tiny_qwen3_moe, "tq", {"codebook": "tq", "bits": 4, "group_size": 32}),
    "whole rows": (models.tiny_qwen3_5_moe, "jangtq", {"match": r"mlp\.experts\.", "codebook": "jangtq", "bits": 2}),
    "integers": (models.tiny_llama, "humming", {"bits": 2, "group_size": 32}),
    "offsets": (models.tiny_llama, "mlx", {"codebook": "affine", "bits": 3, "group_size": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_threads_and_pieces_change_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make, format, rule = CASES[case]
    source = make(tmp_path / "source")
    rules = [{"match": PROJECTIONS} | rule]
    config = parse_config({"model": {"name": str(source)}, "plan": {"rules": rules}, "export": {"format": format}})
    whole = convert(config, tmp_path / "whole")
    before = torch.get_num_threads()
    try:
        for count, piece in ((1, 1), (3, 500), (2, 1 << 22)):
            torch.set_num_threads(count)
            monkeypatch.setattr("gsq.convert.PIECE", piece)
            found = convert(config, tmp_path / f"pieces of {piece}")
            assert torch.get_num_threads() == count
            assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in whole.iterdir())
            for path in found.iterdir():
                assert path.read_bytes() == (whole / path.name).read_bytes(), path
    finally:
        torch.set_num_threads(before)


def test_a_thread_has_torch_to_itself():
    before = torch.get_num_threads()
    with threads() as pool:
        assert torch.get_num_threads() == 1
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


def test_results_come_in_order_and_few_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gsq.convert.AHEAD", 3)
    taken = []
    items = ((taken.append(index) or index,) for index in range(10))
    with threads() as pool:
        results = ahead(pool, lambda index: index * index, items)
        assert taken == [0, 1, 2]
        assert next(results) == 0
        assert taken == [0, 1, 2, 3]
        assert list(results) == [index * index for index in range(1, 10)]


def test_tensors_are_rounded_in_stored_order(tmp_path: Path):
    source = Checkpoint.open(models.tiny_llama(tmp_path / "source"))
    names = [name for name in source.tensors if name.endswith("proj.weight")][:2]
    entries = {}
    for name in names:
        shape = source.tensors[name].shape
        codebook = Codebook.tq(3, 32, shape[-1])
        entries[name] = PlanEntry(name, shape, "bfloat16", codebook, [name], "", "", 0, 1, 1)
    with threads() as pool:
        rounded = Rounded(source, Plan(entries), pool)
        with pytest.raises(ValueError, match=rf"{names[1]} was asked for before {names[0]}"):
            rounded.load(names[1])
