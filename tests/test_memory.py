"""Where large tensors live, what counts as taken, and micro-batches that shrink."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from gsq import memory
from gsq.errors import UserError
from gsq.memory import Batch, Memory, Rooms

CPU = torch.device("cpu")
KB = 1 << 10


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "SMALL", KB)


def test_the_host_is_filled_first_then_files_and_both_are_given_back(tmp_path: Path):
    room = Memory(CPU, Rooms(host=10 * KB), tmp_path)
    first = room.empty((4, KB), torch.bfloat16)
    second = room.empty((3, KB), torch.int8)
    assert room.taken == {"device": 0, "host": 8 * KB, "file": 3 * KB}
    del first
    gc.collect()
    third = room.zeros((2, KB), torch.float32, near=True)  # on a CPU all is near
    assert room.taken == {"device": 0, "host": 8 * KB, "file": 3 * KB}
    del second, third
    gc.collect()
    assert room.taken == {"device": 0, "host": 0, "file": 0}
    assert room.most == {"device": 0, "host": 8 * KB, "file": 3 * KB}


@pytest.mark.parametrize("host", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_tensors_are_like_any_others(tmp_path: Path, host: int, dtype: torch.dtype):
    room = Memory(CPU, Rooms(host=host), tmp_path)
    expected = torch.arange(6 * KB).view(2, 3, KB).to(dtype)
    tensor = room.empty((2, 3, KB), dtype)
    tensor[0], tensor[1, 1:] = expected[0], expected[1, 1:]
    tensor[:, 0].copy_(expected[:, 0])
    part = tensor[1:]
    del tensor  # a view keeps the pages
    gc.collect()
    assert torch.equal(part, expected[1:])
    assert not room.zeros((5, KB), dtype).any()


def test_what_is_taken_is_counted_until_the_last_view_is_gone(tmp_path: Path):
    room = Memory(CPU, Rooms(host=8 * KB), tmp_path)
    parameter = torch.nn.Parameter(room.zeros((2, KB), torch.float32))
    view = parameter.data[1]
    del parameter
    gc.collect()
    assert room.taken["host"] == 8 * KB
    del view
    gc.collect()
    assert room.taken["host"] == 0


def test_a_copied_module_is_another_one_of_which_parameters_are_counted(tmp_path: Path):
    room = Memory(CPU, Rooms(host=4 * KB), tmp_path)
    original = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64)).requires_grad_(False)
    original.append(original[0])  # a module twice
    copied = room.copied(original)
    assert room.taken == {"device": 0, "host": 0, "file": 8 * KB}
    assert copied[2] is copied[0]
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    for mine, theirs in zip(copied.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    copied[0].weight.zero_()
    assert original[0].weight.any()
    del copied, mine, theirs
    gc.collect()
    assert room.taken["file"] == 0


def test_files_have_no_names(tmp_path: Path):
    room = Memory(CPU, Rooms(host=0), tmp_path / "new")
    kept = room.zeros((4 * KB,), torch.uint8)
    assert (tmp_path / "new").is_dir()
    assert not os.listdir(tmp_path / "new")
    assert kept.numel() == 4 * KB


def test_small_tensors_are_not_counted(tmp_path: Path):
    room = Memory(CPU, Rooms(host=0), tmp_path)
    room.empty((KB - 1,), torch.uint8)
    assert room.most["file"] == 0


def test_a_full_disk_is_found_when_room_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"4\.10 kB more.*No space left on device.*memory\.disk_dir"):
        Memory(CPU, Rooms(host=0), tmp_path).empty((4 * KB,), torch.uint8)


def test_work_is_done_again_with_half_the_windows():
    batch, tries = Batch(7), []

    def work() -> str:
        tries.append(batch.windows)
        if batch.windows > 2:
            raise torch.OutOfMemoryError("too much")
        return "done"

    assert batch.fitted(work) == "done"
    assert tries == [7, 4, 2]
    assert batch.windows == 2  # for all that follows


def test_one_window_that_does_not_fit():
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    with pytest.raises(UserError, match=r"Tried to allocate 3 GiB\).*calib\.length"):
        Batch(4).fitted(work)
