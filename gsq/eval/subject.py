"""Whom the generative tests talk to: a model in this process, or a server that speaks OpenAI's protocol.

Both answer greedily, count tokens as the model sees them, and tell the time of the first token. A prompt is
plain text, which is completed, or a list of chat messages, which the model's chat template joins. What a test
asks, and how answers are judged, is not known here.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gsq import units
from gsq.errors import UserError
from gsq.export.base import format_of, open_model
from gsq.hardware import available_bytes
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import load_tokenizer, resolve_model
from gsq.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gsq.eval.kvcache import Scheme

Message = dict[str, str]  # role and content
Prompt = str | list[Message]

TEMPLATE = {"enable_thinking": False}  # what chat templates are told; those without a switch for it ignore it
KERNEL_FORMATS = ("humming", "tq")  # that `gsq.hf` keeps packed on a GPU
ROOM = 1.1  # of the weights: what activations and caches need beside them
TIMEOUT = 600  # seconds that a server may be silent
ERROR_LENGTH = 500  # characters of a server's words that are worth repeating


@dataclass(frozen=True)
class Answer:
    """What a subject generated, and when: seconds from the request to the first new token, and to the last."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds_to_first: float
    seconds: float


class Subject(Protocol):
    """A model that can be asked. `window`: tokens of prompt and answer together at most; `chats`: takes messages.

    `device` is None where the model's memory cannot be seen.
    """

    name: str
    window: int | None
    chats: bool
    device: torch.device | None

    def generate(self, prompt: Prompt, max_tokens: int, ignore_end: bool = False) -> Answer:
        """The likeliest continuation; `ignore_end` asks to go on behind tokens that end an answer."""

    def count(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the model sees them, special tokens and chat template included."""


class Local:
    """A transformers model in this process; `scheme` says how its key-value cache is kept (None: transformers' own)."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, scheme: Scheme | None = None, name="model"
    ):
        self.model, self.tokenizer, self.scheme, self.name = model, tokenizer, scheme, name
        self.device: torch.device = model.device
        self.window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.chats = bool(tokenizer.chat_template)
        ends = _end_tokens(model, tokenizer)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else None
        # The model's own settings may ask for sampling and penalties; only what ends an answer is kept of them
        model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=padding, do_sample=False)

    @classmethod
    def open(cls, path: str | Path, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None) -> Local:
        """Load a dense folder, a GGUF file or an export of ours.

        Weights are decoded, except those of Humming and TQ exports on a GPU, which stay packed. Raises
        `UserError` for a model that does not fit the device's memory, before any weight is read.
        """
        folder = resolve_model(str(path))
        tokenizer = load_tokenizer(folder)
        format = format_of(Checkpoint.open(folder))
        if device.type == "cuda" and format in KERNEL_FORMATS:
            model = load_packed(folder, format, device, dtype)
        else:
            model = load_dense(folder, device, dtype)
        return cls(model, tokenizer, scheme, Path(path).name)

    @torch.no_grad()
    def generate(self, prompt: Prompt, max_tokens: int, ignore_end: bool = False) -> Answer:
        """The likeliest continuation of `prompt`, with a fresh cache."""
        clock = _Clock()
        ids = torch.tensor([encode(self.tokenizer, prompt)], device=self.device)  # [1, L]
        if self.window is not None and ids.shape[1] + max_tokens > self.window:
            raise UserError(
                f"{ids.shape[1]} tokens and an answer of {max_tokens} are more than the {self.window} positions of "
                f"{self.name}; use a smaller context"
            )
        cache = {"past_key_values": self.scheme.cache(self.model)} if self.scheme else {}
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens if ignore_end else None,
            streamer=clock,
            **cache,
        )
        new = output[0, ids.shape[1] :].tolist()
        seconds = clock.seconds()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, ids.shape[1], len(new), clock.to_first or seconds, seconds)

    def count(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the model sees them."""
        return len(encode(self.tokenizer, prompt))


class Unreachable(UserError):
    """Nothing answers at a URL."""


class Server:
    """A model behind a URL such as `http://127.0.0.1:8000` (vLLM, mlx_lm.server, llama-server, SGLang).

    `model` may be left out if the server lists only one; mlx_lm.server calls its own `default_model`.
    `tokenizer`, a folder or hub id, spares a request each time tokens are counted. A key is taken from
    `OPENAI_API_KEY`. Raises `UserError` if nothing answers.
    """

    device = None
    scheme = None  # the server keeps its cache as it likes

    def __init__(self, url: str, model: str | None = None, tokenizer: str | Path | None = None, timeout=TIMEOUT):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.tokenizer_path, self.timeout = tokenizer, timeout
        listed = self._listed(needed=model is None)
        if model is None and len(listed) != 1:
            raise UserError(
                f"{self.url} names {len(listed)} models ({', '.join(map(str, listed))}); say which one to ask"
            )
        self.name: str = model or next(iter(listed))
        self.window: int | None = listed.get(self.name, {}).get("max_model_len")  # as vLLM says it
        self.listed = list(listed)

    def generate(self, prompt: Prompt, max_tokens: int, ignore_end: bool = False) -> Answer:
        """The likeliest continuation of `prompt`, streamed for the time of its first token."""
        route, body = self._request(prompt, max_tokens)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if ignore_end:
            body["ignore_eos"] = True  # vLLM, SGLang and llama-server; others stop where they stop
        pieces, usage, first, start = [], None, None, time.perf_counter()
        for event in self._events(route, body):
            piece, thought = _delta(event)
            if first is None and (piece or thought):
                first = time.perf_counter() - start
            pieces.append(piece)
            usage = event.get("usage") or usage
        seconds = time.perf_counter() - start
        if not usage:
            raise UserError(f"{self.url} did not say how many tokens it generated (stream_options.include_usage)")
        text = "".join(pieces)
        return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], first or seconds, seconds)

    def count(self, prompt: Prompt) -> int:
        """Tokens of the prompt: by the tokenizer if there is one, else what the server says that a token more costs."""
        if self.tokenizer is not None:
            return len(encode(self.tokenizer, prompt))
        answer = self._json(*self._request(prompt, 1))
        try:
            return answer["usage"]["prompt_tokens"]
        except (KeyError, TypeError):
            raise UserError(f"{self.url} counts no tokens (usage.prompt_tokens); give the model's tokenizer") from None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was named."""
        return load_tokenizer(resolve_model(str(self.tokenizer_path))) if self.tokenizer_path else None

    @property
    def chats(self) -> bool:
        """Whether it takes messages: yes, as far as its tokenizer does not tell otherwise."""
        return self.tokenizer is None or bool(self.tokenizer.chat_template)

    def _listed(self, needed: bool) -> dict[str, dict]:
        """What the server says of its models, by name; nothing if its list is broken and not `needed`.

        mlx_lm.server's is empty where the hub's cache does not exist.
        """
        try:
            return {entry["id"]: entry for entry in self._json("models")["data"]}
        except Unreachable:
            raise
        except (UserError, LookupError, TypeError) as error:
            if needed:
                raise UserError(f"{self.url} does not list its models ({error}); say which one to ask") from None
            return {}

    def scores_prompts(self) -> bool:
        """Whether the server tells log-probabilities of a prompt's tokens, which likelihood tasks need."""
        body = {"model": self.name, "prompt": "one two three", "max_tokens": 1, "echo": True, "logprobs": 1}
        try:
            logprobs = self._json("completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        except (UserError, LookupError, TypeError):
            return False
        return len(logprobs) > 2  # without echo only the new token has one

    def _request(self, prompt: Prompt, max_tokens: int) -> tuple[str, dict[str, Any]]:
        """Route and body of a greedy completion."""
        body = {"model": self.name, "max_tokens": max_tokens, "temperature": 0}
        if isinstance(prompt, str):
            return "completions", body | {"prompt": prompt}
        return "chat/completions", body | {"messages": prompt, "chat_template_kwargs": TEMPLATE}

    def _json(self, route: str, body: dict | None = None) -> dict:
        """The answer to a request; a GET if there is no body."""
        return self._parsed(route, b"".join(self._lines(route, body)))

    def _events(self, route: str, body: dict) -> Iterator[dict]:
        """Events of a streamed answer (server-sent events: lines `data: {...}`, others are comments)."""
        for line in self._lines(route, body):
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield self._parsed(route, data)

    def _parsed(self, route: str, content: bytes) -> dict:
        """An answer that is an object and no error."""
        try:
            answer = json.loads(content)
        except ValueError:
            raise UserError(f"{self.url}/{route} did not answer in JSON: {_excerpt(content)}") from None
        if not isinstance(answer, dict) or answer.get("error"):
            raise UserError(f"{self.url}/{route} answered: {_excerpt(content)}")
        return answer

    def _lines(self, route: str, body: dict | None) -> Iterator[bytes]:
        """Lines of the answer as they arrive; raises `UserError` for whatever goes wrong on the way."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{self.url}/{route}", data, headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                yield from answer
        except urllib.error.HTTPError as error:
            raise UserError(self._refusal(route, error.code, error.read())) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"cannot reach {self.url} ({reason}); start the server, or correct the URL") from None

    def _refusal(self, route: str, status: int, content: bytes) -> str:
        """What to tell of an answer that is an error."""
        reason = f"{self.url}/{route} answered {status}: {_excerpt(content)}"
        if status == 404 and route != "models":
            reason += f"; it was asked for model {self.name!r}, and names {', '.join(self.listed) or 'none'}"
        return reason


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; raises `UserError` for messages if there is no chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; use prompts that are completed")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **TEMPLATE)["input_ids"]


def load_dense(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a dense folder or an export of ours, all weights decoded to `dtype`."""
    skeleton = Skeleton(open_model(folder), device, dtype)
    check_room(folder, sum(parameter.nbytes for parameter in skeleton.model.parameters()), device)
    model = skeleton.whole()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_packed(folder: Path, format: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a Humming or TQ export through transformers, which keeps weights packed on a GPU."""
    from transformers import AutoModelForCausalLM

    import gsq.hf

    check_room(folder, Checkpoint.open(folder).nbytes, device)
    named = {"quantization_config": gsq.hf.TQConfig()} if format == "tq" else {}  # TQ exports do not name themselves
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, dtype=dtype, **named).eval()


def free_memory() -> None:
    """Give back what models held that nothing refers to any more: the next one must fit beside it."""
    gc.collect()  # modules refer to each other in circles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_room(folder: Path, nbytes: int, device: torch.device) -> None:
    """Raise `UserError` if weights of so many bytes, and what is computed with them, do not fit the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if nbytes * ROOM > free:
        raise UserError(
            f"{folder} needs {units.size(nbytes * ROOM)} of memory to generate, "
            f"and {device} has {units.size(free)} free; "
            "serve it elsewhere and give the server's URL"
        )


class _Clock(BaseStreamer):
    """Notes when the first new token arrives; the first thing that arrives is the prompt."""

    def __init__(self):
        self.start = time.perf_counter()
        self.arrived = 0
        self.to_first: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self.arrived += 1
        if self.arrived == 2:
            self.to_first = self.seconds()

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model's settings, which may be one or several, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({end for end in ends if end is not None})


def _delta(event: dict) -> tuple[str, bool]:
    """Text of a streamed event, and whether it carries thoughts that are not part of the answer."""
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or "", bool(
        delta.get("reasoning_content") or delta.get("reasoning")
    )


def _excerpt(content: bytes) -> str:
    """The beginning of what a server says."""
    return content.decode(errors="replace").strip()[:ERROR_LENGTH] or "nothing"
