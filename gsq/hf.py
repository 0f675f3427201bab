"""Loading exports in transformers: `import gsq.hf`, then `AutoModelForCausalLM.from_pretrained(folder)`.

    import gsq.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/qwen36/export", device_map="cuda")  # humming
    model = AutoModelForCausalLM.from_pretrained("runs/tq", device_map="cuda", quantization_config=gsq.hf.TQConfig())

On a GPU weights stay packed, and products run on the packed bits (`gsq.kernels.packed`); anywhere else
they are decoded while they are loaded, and the model is an ordinary one, which can be trained or saved.

transformers finds a quantizer by the `quant_method` of `config.json`, so importing this module only
registers ours with it. TQ exports have no such entry, on purpose: their other readers take a model with
one for something else. There the quantizer is named by hand.

Source: `transformers.quantizers.base.HfQuantizer`, `transformers.core_model_loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from gsq.errors import UserError
from gsq.serve.modules import pack_modules
from gsq.serve.parameters import PackedParameter, open_packed, packed_parameters

logger = logging.get_logger(__name__)


class PackedConfig(QuantizationConfigMixin):
    """How an export is stored, in the export's own words, and how to load it.

    `dequantize`: True decodes all weights, False keeps them packed wherever they are; by default they
    are packed if any part of the model goes to a GPU.
    """

    method: str

    def __init__(self, dequantize: bool | None = None, **stored: Any):
        self.quant_method = self.method
        self.dequantize = dequantize
        self.stored = {key: value for key, value in stored.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"quant_method": self.quant_method, **self.stored}


class HummingConfig(PackedConfig):
    """`quantization_config` of a Humming export."""

    method = "humming"


class TQConfig(PackedConfig):
    """Stands for the `tq_config.json` of a TQ export, which is read from its folder."""

    method = "tq"


class PackedQuantizer(HfQuantizer):
    """Puts packed modules into a model before its weights are loaded, and decodes what does not stay packed."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # also if the config comes from the caller

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: str | Mapping[str, object] | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise ValueError("packed weights are loaded from the folder of an export, not from a state_dict")
        config = self.quantization_config
        if config.dequantize is None:
            config.dequantize = not uses_kernels(device_map)
        parameters = packed_parameters(model, open_packed(Path(checkpoint_files[0]).parent))
        packed = set() if config.dequantize else pack_modules(model, parameters)
        self.loading = LoadPacked(parameters, packed)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """Ours first, so that the model's own, which merge experts, only see what is not packed."""
        renamings = [entry for entry in weight_conversions if isinstance(entry, WeightRenaming)]
        return [PackedConverter(self.loading, renamings), *weight_conversions]

    def get_new_dtype(self, converter: object, param: object, dtype: torch.dtype | None) -> torch.dtype | None:
        """Codes and scales are read as they are stored; all else as in any model."""
        return None if isinstance(converter, PackedConverter) else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        """Packed models are not saved: the export is there already."""
        logger.warning("A packed model is not saved; copy the export's folder, or load it with dequantize=True first")
        return False

    @property
    def is_trainable(self) -> bool:
        """Products with packed weights have no gradient."""
        return False


class LoadPacked(ConversionOps):
    """From stored pieces to the buffers of a packed module, or to decoded weights.

    It is given the pieces of one parameter, in the order of their names, as lists "codes" and "scales".
    """

    def __init__(self, parameters: Mapping[str, PackedParameter], packed: set[str]):
        self.parameters, self.packed = parameters, packed
        for name, parameter in parameters.items():
            for pieces in (parameter.codes, parameter.scales):
                if sorted(pieces, key=dot_natural_key) != list(pieces):
                    raise UserError(f"transformers would put the parts of {name} together in another order")

    def __deepcopy__(self, memo: dict) -> LoadPacked:
        """transformers copies a converter for every tensor; what it knows is the same for all."""
        return self

    def places(self, renamings: list[WeightRenaming]) -> dict[str, tuple[str, str]]:
        """For each stored tensor, under the name that `renamings` give it: where it goes, and as what."""
        return {
            apply_renamings(stored, renamings): (self._anchor(name), kind)
            for name, parameter in self.parameters.items()
            for kind, pieces in zip(("codes", "scales"), (parameter.codes, parameter.scales), strict=True)
            for stored in pieces
        }

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tensors by their names in the model."""
        name = full_layer_name.removesuffix(".words")
        codes, scales = input_dict["codes"], input_dict["scales"]
        if name not in self.packed:
            return {name: self.parameters[name].decoded(codes, scales, model.get_parameter(name).dtype)}
        words, joined = self.parameters[name].joined(codes, scales)
        return {f"{name}.words": words, f"{name}.scales": joined}

    def _anchor(self, name: str) -> str:
        """The tensor of the model by whose name transformers collects what belongs to a parameter."""
        return f"{name}.words" if name in self.packed else name


class PackedConverter(WeightConverter):
    """Looks up by name what other converters find by pattern: patterns cannot tell packed weights from others."""

    __slots__ = ("places",)

    def __init__(self, loading: LoadPacked, renamings: list[WeightRenaming]):
        super().__init__(["codes", "scales"], ["words"], [loading])
        self.places = _Shared(loading.places(renamings))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Where a stored tensor goes, and as what; its own name and None if it is not packed."""
        return self.places.get(source_key, (source_key, None))

    def was_used(self) -> bool:
        """Never, when a model is saved: decoded weights are saved as they are."""
        return False


class _Shared(dict):
    """A dictionary that copies of its owner share."""

    def __deepcopy__(self, memo: dict) -> _Shared:
        return self


def uses_kernels(device_map: str | Mapping[str, object] | None) -> bool:
    """Whether any part of a model goes to a GPU: `device_map` is the name of a policy, or has a place for each part."""
    if isinstance(device_map, str):
        return torch.cuda.is_available()  # every policy fills GPUs first
    places = [place for place in (device_map or {}).values() if place != "disk"]
    return any(isinstance(place, int) or torch.device(place).type == "cuda" for place in places)


def register() -> None:
    """Tell transformers of the formats that it does not know itself."""
    for config in (HummingConfig, TQConfig):
        if config.method not in AUTO_QUANTIZER_MAPPING:
            register_quantization_config(config.method)(config)
            register_quantizer(config.method)(PackedQuantizer)


register()
