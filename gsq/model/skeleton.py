"""A transformers model without weights, of which one decoder layer at a time becomes real.

The model's own code does everything: its forward prepares masks and position embeddings and
applies the final norm and head; we only stand in for its decoder layers. So any architecture that
transformers has, and whose decoder is a list of layers, is walked without a line written for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from gsq.errors import UserError
from gsq.model.checkpoint import Checkpoint, sound
from gsq.model.targets import EXPERT_PARTS, sources


class Skeleton:
    """The model of a checkpoint on the meta device.

    Attributes: `num_layers` (that will be walked) and `layer_names` (their paths in the module tree).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        max_layers: int | None = None,
    ):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = build_meta_model(checkpoint.config, dtype)
        self.decoder = self.model.get_decoder()
        self.num_layers = min(len(self.decoder.layers), max_layers or len(self.decoder.layers))
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder.layers)
        self.layer_names = [f"{prefix}.{index}" for index in range(len(self.decoder.layers))]
        self._layers = list(self.decoder.layers)  # which others stand in for, at times
        self._move_buffers()

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list[dict]]:
        """Tokens `[B, L]` to the hidden states before layer 0, `[B, L, H]`, and each layer's keyword arguments.

        The arguments (masks, position embeddings) depend on the shape `[B, L]` alone.
        """
        self._materialize(self.model.get_input_embeddings())
        recorders = [_Recorder(layer) for layer in self.decoder.layers]
        recorders[-1].last = True
        with self._stand_in(recorders), suppress(SeenEnough):
            self._forward(tokens)
        return recorders[0].hidden, [recorder.kwargs for recorder in recorders[: self.num_layers]]

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[B, L, V]` from the hidden states `[B, L, H]` behind the last layer: final norm and head."""
        self._materialize(self.model.get_input_embeddings())
        self._materialize(self.model.get_output_embeddings())
        for name, child in self.decoder.named_children():
            if name != "layers":
                self._materialize(child)
        players = [_Player(layer, hidden) for layer in self.decoder.layers]
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with self._stand_in(players):
            return self._forward(tokens).logits

    def whole(self) -> nn.Module:
        """The model with all its weights, ready to generate text; it is this skeleton's own, and keeps them.

        What text does not pass through, such as a vision tower, is left out: some formats do not have it.
        """
        for part in (self.decoder, self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            self._materialize(part)
        self.model.tie_weights()
        unused: list[str] = []
        for path, module in list(self.model.named_modules()):
            weights = list(module.parameters())
            if weights and all(w.is_meta for w in weights) and not path.startswith(tuple(unused)):
                owner, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(owner), name, nn.Identity())
                unused.append(path + ".")
        return self.model.requires_grad_(False)

    def layers(self, ahead: bool | None = None) -> Iterator[nn.Module]:
        """The decoder layers that will be walked, each with its weights, which belong to the caller.

        `ahead`: while the caller works with one, the next is read into the host's memory; by default where the
        device is an accelerator, since on a CPU both would share the cores, and memory would hold one layer more.
        """
        if not (self.device.type != "cpu" if ahead is None else ahead):
            yield from map(self.load_layer, range(self.num_layers))
            return
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._read_layer, 0, torch.device("cpu"))]
            for index in range(1, self.num_layers + 1):
                layer = [coming.pop().result()]  # handed over, not held
                if index < self.num_layers:
                    coming.append(reader.submit(self._read_layer, index, torch.device("cpu")))
                yield layer.pop().to(self.device)

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, which belong to the caller."""
        return self._read_layer(index, self.device)

    def _read_layer(self, index: int, device: torch.device) -> nn.Module:
        layer = copy.deepcopy(self._layers[index])
        self._fill(layer, self.layer_names[index] + ".", device)
        return layer.eval().requires_grad_(False)

    def run_layer(self, layer: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        """Hidden states `[B, L, H]` behind `layer`."""
        return first_tensor(layer(hidden.to(self.device, self.dtype), **kwargs))

    def read(
        self, parameter: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """A parameter of the module tree, by default on the device of the walk.

        Experts are read one at a time into their place, so that they are never held twice.
        """
        names, device = self.sources(parameter, shape), device or self.device
        if len(shape) == 3 and parameter.rpartition(".")[2] in EXPERT_PARTS:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            for place, name, part in self._places(tensor, names):
                place.copy_(self.checkpoint.read(name, part))
        else:
            self._check_shape(names[0], shape)
            tensor = self.checkpoint.read(names[0]).to(device, dtype)
        return sound(parameter, tensor)

    def replace(self, parameter: str, weight: Tensor) -> None:
        """Put `weight` into the model in place of the checkpoint's, for a parameter outside the decoder layers.

        A head that is tied to it gets it, too.
        """
        weight = nn.Parameter(weight.to(self.device, self.dtype), requires_grad=False)
        head, shape = self.model.get_output_embeddings(), tuple(weight.shape)
        _set_parameter(self.model, parameter, weight)
        if head is not None and self.sources(self._path(head) + ".weight", shape) == self.sources(parameter, shape):
            head.weight = weight

    def sources(self, parameter: str, shape: tuple[int, ...]) -> list[str]:
        """Names of the checkpoint's tensors that make up a parameter."""
        for alias in aliases(parameter):
            found = sources(alias, shape, self.checkpoint.tensors)
            if found:
                return found
        head = self.model.get_output_embeddings()
        if head is not None and parameter == self._path(head) + ".weight":  # tied
            return self.sources(self._path(self.model.get_input_embeddings()) + ".weight", shape)
        raise UserError(f"{self.checkpoint.folder} lacks {parameter}, which its config.json asks for")

    def _places(self, experts: Tensor, names: list[str]) -> Iterator[tuple[Tensor, str, int | None]]:
        """Where in `experts` `[experts, out, in]` each stored piece belongs: an index of one tensor, or a tensor."""
        if len(self.checkpoint.tensors[names[0]].shape) == 3:
            self._check_shape(names[0], tuple(experts.shape))
            yield from ((expert, names[0], index) for index, expert in enumerate(experts))
            return
        parts = len(names) // len(experts)
        for place, name in zip((part for expert in experts for part in expert.chunk(parts)), names, strict=True):
            self._check_shape(name, tuple(place.shape))
            yield place, name, None

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        shape = self.checkpoint.tensors[name].shape
        if shape != wanted:
            raise UserError(f"{name} has shape {shape}, but config.json asks for {wanted}")

    def _fill(self, module: nn.Module, prefix: str, device: torch.device | None = None) -> None:
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                tensor = self.read(prefix + name, tuple(parameter.shape), parameter.dtype, device)
                _set_parameter(module, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in module.named_buffers():
            if prefix + name in self.checkpoint.tensors:
                buffer.copy_(self.checkpoint.read(prefix + name))

    def _materialize(self, module: nn.Module | None) -> None:
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            self._fill(module, self._path(module) + ".")

    def _path(self, module: nn.Module) -> str:
        return next(name for name, candidate in self.model.named_modules() if candidate is module)

    def _forward(self, tokens: Tensor):
        return self.model(input_ids=tokens.to(self.device), use_cache=False)

    def _move_buffers(self) -> None:
        """Rotary frequencies and the like are computed, not stored; they live where the model runs."""
        for module in self.decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _stand_in(self, layers: list[nn.Module]) -> Iterator[None]:
        original = self.decoder.layers
        self.decoder.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            self.decoder.layers = original


def build_meta_model(config: dict, dtype: torch.dtype) -> nn.Module:
    """The transformers model that `config.json` (parsed) describes: parameters on meta, buffers real."""
    config = dict(config)
    architecture = (config.get("architectures") or [None])[0]
    model_type = config.pop("model_type", None)
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} does not know architecture {architecture!r} ({model_type!r}); "
            "upgrade transformers, or check config.json"
        )
    parsed = CONFIG_MAPPING[model_type].from_dict(config)
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(parsed, dtype=dtype)
    return model.eval()


def first_tensor(output: Tensor | tuple) -> Tensor:
    """The hidden states of a module's output, which some modules wrap in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class SeenEnough(Exception):
    """Ends a forward whose rest is of no interest."""


class _StandIn(nn.Module):
    """In place of a decoder layer, whose attributes it shows to the model's code."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["_layer"] = layer  # past nn.Module, so that it is not a child

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_layer"], name)


class _Recorder(_StandIn):
    """Keeps the arguments of its layer and passes the hidden states on; the `last` one ends the forward."""

    last = False

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        self.__dict__["hidden"], self.__dict__["kwargs"] = hidden_states, kwargs
        if self.last:
            raise SeenEnough
        return hidden_states


class _Player(_StandIn):
    """Answers with given hidden states."""

    def __init__(self, layer: nn.Module, hidden: Tensor):
        super().__init__(layer)
        self.__dict__["hidden"] = hidden

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        return self.hidden.to(hidden_states)


def aliases(parameter: str) -> Iterator[str]:
    """Names under which checkpoints store a parameter: with and without the wrapper of multimodal models."""
    yield parameter
    if parameter.startswith("model.language_model."):
        yield parameter.replace("model.language_model.", "model.", 1)
        yield parameter.replace("model.language_model.", "language_model.model.", 1)
    elif parameter.startswith("model."):
        yield parameter.replace("model.", "model.language_model.", 1)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
