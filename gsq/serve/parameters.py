"""Which parameters of a model an export stores packed, and where: the same for every format and for any model tree.

A parameter is that of a module, a Linear's `[out, in]` or fused experts `[experts, out, in]`; an export
stores it as one tensor of codes and one of scales, or as a pair for every expert and projection. Since
codes of rows follow each other in all formats that have packed kernels, the pieces only need to be
put one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gsq.codebook import Codebook, QuantizedTensor
from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, PackedTensor, open_model
from gsq.kernels.packing import WORD, unpack_bytes
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import aliases
from gsq.model.targets import sources

CHUNK = 1 << 22  # weights decoded at once, so that little memory is needed beside the result
KERNEL_FORMATS = ("humming", "compressed-tensors", "compressed-tensors-wide", "tq")  # whose codes the kernels read


@dataclass(frozen=True)
class PackedParameter:
    """A parameter of `shape` `[..., out, in]`, whose pieces are the stored tensors `codes` and `scales`, pairwise.

    They are in the order of rows: expert after expert, gate before up.
    """

    shape: tuple[int, ...]
    codebook: Codebook
    codes: tuple[str, ...]
    scales: tuple[str, ...]

    @property
    def row_bits(self) -> int:
        """Bits of a row of codes."""
        return self.codebook.columns(self.shape[-1]) * self.codebook.bits

    @property
    def whole_words(self) -> bool:
        """Whether rows are whole 32-bit words, as kernels need them."""
        return self.row_bits % WORD == 0

    @property
    def words_shape(self) -> tuple[int, ...]:
        """Shape of all codes as int32 words, if rows are whole words."""
        return (*self.shape[:-1], self.row_bits // WORD)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of all scales `[..., out, groups]`."""
        return (*self.shape[:-1], self.codebook.groups(self.codebook.columns(self.shape[-1])))

    def joined(self, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The pieces as one: int32 words `words_shape` and scales `scales_shape`, in memory of their own."""
        octets = torch.cat([piece.contiguous().view(torch.uint8).view(-1) for piece in codes])
        all_scales = torch.cat([piece.reshape(-1) for piece in scales])
        return octets.view(torch.int32).view(self.words_shape), all_scales.view(self.scales_shape)

    def decoded(self, codes: Sequence[Tensor], scales: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weights `shape` that the pieces stand for, computed in float32."""
        in_features, groups = self.shape[-1], self.scales_shape[-1]
        weights = torch.empty(self.shape, dtype=dtype, device=codes[0].device)
        rows, step = weights.view(-1, in_features), max(1, CHUNK // in_features)
        place = 0
        for piece, piece_scales in zip(codes, scales, strict=True):
            octets = piece.contiguous().view(torch.uint8).view(-1, self.row_bits // 8)
            piece_scales = piece_scales.reshape(-1, groups)
            for start in range(0, len(octets), step):
                part = slice(start, start + step)
                unpacked = unpack_bytes(octets[part], self.codebook.bits)
                values = QuantizedTensor(unpacked, piece_scales[part], self.codebook).dequantize(dtype)
                rows[place : place + len(values)] = values
                place += len(values)
        return weights

    def read(self, checkpoint: Checkpoint) -> tuple[list[Tensor], list[Tensor]]:
        """The pieces of codes and of scales, from the export that holds them."""
        return [checkpoint.read(name) for name in self.codes], [checkpoint.read(name) for name in self.scales]


def open_packed(folder: str | Path) -> DecodedCheckpoint:
    """An export whose codes the packed kernels read; raises `UserError` for any other folder."""
    view = open_model(folder)
    packed = view.packed.values() if isinstance(view, DecodedCheckpoint) else ()
    if not any(tensor.codebook for tensor in packed):
        raise UserError(f"{folder} holds no weights that packed kernels read; they read {', '.join(KERNEL_FORMATS)}")
    return view


def packed_parameters(model: nn.Module, view: DecodedCheckpoint) -> dict[str, PackedParameter]:
    """The parameters of `model` that an export stores packed, by name; raises `UserError` if one does not fit."""
    found = {}
    for name, parameter in model.named_parameters():
        stored = _stored_names(name, tuple(parameter.shape), view)
        if any(part in view.packed for part in stored):
            found[name] = _described(name, tuple(parameter.shape), {part: view.packed.get(part) for part in stored})
    return found


def _stored_names(name: str, shape: tuple[int, ...], view: DecodedCheckpoint) -> list[str]:
    """Dense tensors of an export that make up a parameter, if it has them."""
    return next(filter(None, (sources(alias, shape, view.tensors) for alias in aliases(name))), [])


def _described(name: str, shape: tuple[int, ...], stored: dict[str, PackedTensor | None]) -> PackedParameter:
    first, *others = stored
    for other in others:
        if _codebook(stored[other]) != _codebook(stored[first]):
            raise UserError(f"{name} consists of {first} and {other}, which are not stored alike; export again")
    tensors = list(stored.values())
    numel = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    if numel != torch.Size(shape).numel() or tensors[0].shape[-1] != shape[-1]:
        raise UserError(f"{name} is {shape} in the model, but {first} is {tensors[0].shape}; export again")
    codes, scales = zip(*(tensor.stored[:2] for tensor in tensors), strict=True)
    return PackedParameter(shape, tensors[0].codebook, codes, scales)


def _codebook(tensor: PackedTensor | None) -> Codebook | None:
    return tensor and tensor.codebook
