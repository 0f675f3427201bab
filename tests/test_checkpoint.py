"""What a checkpoint on disk may be, and which damage is named instead of loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gsq.errors import UserError
from gsq.model.checkpoint import INDEX, Checkpoint, CheckpointWriter, save_parts

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor([float("nan"), -0.0], dtype=torch.float32),
    "c": torch.randint(0, 255, (40,), dtype=torch.uint8),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write(folder: Path, shard_bytes: int = 1 << 30) -> Path:
    writer = CheckpointWriter(folder, shard_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.write_json("config.json", {"model_type": "none"})
    return writer.finish()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "model", shard_bytes=40)


def edit_index(folder: Path, **weight_map: str) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("shard_bytes", [1, 40, 1 << 30])
def test_roundtrip(tmp_path: Path, shard_bytes: int):
    checkpoint = Checkpoint.open(write(tmp_path / "model", shard_bytes))
    assert checkpoint.config == {"model_type": "none"}
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert raw(read) == raw(tensor)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_shards_are_named_and_indexed(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_files_may_be_read_by_whom_the_umask_allows(sharded: Path):
    assert len({path.stat().st_mode for path in sharded.iterdir()}) == 1


def test_large_tensors_are_read_and_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Checkpoint.open(write(tmp_path / "model"))
    monkeypatch.setattr("gsq.model.checkpoint.PART", 8)  # bytes: a row of "a", all of "b"
    assert [len(list(source.parts(name))) for name in ("a", "b", "c", "scalar")] == [2, 1, 5, 1]
    writer = CheckpointWriter(tmp_path / "copy")
    for name, info in source.tensors.items():
        writer.add_parts(info.shape, ({name: part, name + "!": part.double()} for part in source.parts(name)))
    writer.write_json("config.json", source.config)
    copy = Checkpoint.open(writer.finish())
    assert copy.nbytes == sum(info.nbytes + 8 * info.numel for info in source.tensors.values())
    for name, tensor in TENSORS.items():
        assert (copy.tensors[name].dtype, copy.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(copy.read(name)) == raw(tensor)
        assert raw(copy.read(name + "!")) == raw(tensor.double())
    assert len({info.file for info in copy.tensors.values()}) == 3  # "a", "c", and what is small


def test_parts_are_stored_as_safetensors_does(tmp_path: Path):
    tensors = {"b": torch.rand(3, 2), "a": torch.rand(3, 5).bfloat16(), "c": torch.rand(3, 1)}
    parts = ({name: tensor[row : row + 1] for name, tensor in tensors.items()} for row in range(3))
    save_parts(tmp_path / "ours", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, parts)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_part_of_a_tensor(sharded: Path):
    assert torch.equal(Checkpoint.open(sharded).read("a", part=1), TENSORS["a"][1])


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "sub/../../x", ".."])
def test_index_must_stay_in_its_folder(sharded: Path, file: str):
    edit_index(sharded, a=file)
    with pytest.raises(UserError, match="outside the checkpoint's folder"):
        Checkpoint.open(sharded)


def test_missing_shard(sharded: Path):
    next(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="is missing; download"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("left", [0, 4, 50, -1])
def test_truncated_shard(sharded: Path, left: int):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(UserError, match="truncated or damaged"):
        Checkpoint.open(sharded)


def test_index_that_promises_too_much(sharded: Path):
    edit_index(sharded, ghost=sorted(path.name for path in sharded.glob("*.safetensors"))[0])
    with pytest.raises(UserError, match="lacks ghost"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_broken_index(sharded: Path, content: str):
    (sharded / INDEX).write_text(content)
    with pytest.raises(UserError):
        Checkpoint.open(sharded)


def test_folder_without_a_model(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds neither"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UserError, match="not valid JSON"):
        Checkpoint.open(tmp_path)


def test_an_existing_folder_is_never_overwritten(sharded: Path):
    before = sorted(path.name for path in sharded.iterdir())
    with pytest.raises(UserError, match="exists already"):
        CheckpointWriter(sharded)
    assert sorted(path.name for path in sharded.iterdir()) == before


def test_an_unfinished_folder_has_no_name_and_is_replaced(tmp_path: Path):
    CheckpointWriter(tmp_path / "model").add("a", TENSORS["a"])
    assert not (tmp_path / "model").exists()
    assert (write(tmp_path / "model") / "model.safetensors").exists()
    assert not (tmp_path / "model.partial").exists()


def test_side_files_are_all_but_weights_and_config(sharded: Path):
    for name in ("tokenizer.json", "LICENSE", "old.bin", "extra.safetensors"):
        (sharded / name).write_text("x")
    assert [path.name for path in Checkpoint.open(sharded).side_files()] == ["LICENSE", "tokenizer.json"]
