"""Writing to a disk that may be full: files that appear whole or not at all, and errors that tell what is needed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gsq import units
from gsq.errors import UserError

REMEDY = "make room and run the same command again; `quantize --resume` keeps finished layers"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; what the system refuses is an `OSError`, as for any other file."""
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors leaves files that only their owner may read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(mode)


def write_whole(path: Path, write: Callable[[Path], object], needed: int) -> None:
    """`write` to a temporary name, flush to disk, rename; see `explained` for `needed`."""
    partial = path.with_name(path.name + ".partial")
    with explained(path, needed):
        try:
            write(partial)
            sync(partial)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Flush a file to the disk, so that a rename never outruns its content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def explained(path: Path, needed: int) -> Iterator[None]:
    """What the system refuses in this block becomes a `UserError`, with the bytes that the user must find."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): {units.size(needed)} needed, "
            f"{units.size(free_bytes(path))} free there; {REMEDY}"
        ) from None


def check_space(path: Path, needed: int) -> None:
    """Raise `UserError` if the disk of `path`, which need not exist yet, has not `needed` bytes left."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(f"{path} needs {units.size(needed)}, but only {units.size(free)} are free there; {REMEDY}")


def free_bytes(path: Path) -> int:
    """Bytes that may still be written beside `path`."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(place).free
