"""The dense checkpoint that an export stands for, for programs that know no quantization.

It knows no format: `open_model` already shows an export as dense tensors.
"""

from __future__ import annotations

from pathlib import Path

from gsq.errors import UserError
from gsq.export.base import DecodedCheckpoint, open_model
from gsq.model.checkpoint import CheckpointWriter


def dequantize(folder: str | Path, out: str | Path) -> Path:
    """Write what the export in `folder` decodes to, in bfloat16, to the new folder `out`.

    Experts become one tensor each, which transformers and vLLM load as well as fused ones; tensors
    that were never quantized are copied bit for bit.
    """
    model = open_model(folder)
    if not isinstance(model, DecodedCheckpoint):
        raise UserError(f"{folder} is dense already; use it as it is")
    writer = CheckpointWriter(out, expected_bytes=model.nbytes)
    for name in model.tensors:
        writer.add(name, model.read(name))
    writer.write_json("config.json", model.config)
    for path in model.side_files():
        writer.copy(path)
    return writer.finish()
