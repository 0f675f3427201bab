"""A server of OpenAI's protocol around a transformers model, for tests of what talks to servers.

`with served(model, tokenizer) as server:` answers at `server.url`, greedily, by transformers alone. `server.requests`
are the bodies that came in; keys of `server.quirks` make it misbehave, or
say by rote what `answer(prompt)` gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import torch

WINDOW = 512


@dataclass
class Served:
    model: torch.nn.Module
    tokenizer: object
    url: str = ""
    names: tuple[str, ...] = ("tiny",)
    requests: list[dict] = field(default_factory=list)
    quirks: dict = field(default_factory=dict)

    def prompt(self, body: dict) -> list[int]:
        """Token ids of whatever a prompt may be."""
        if "messages" in body:
            return self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        prompt = body["prompt"]
        prompt = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    @torch.no_grad()
    def continuation(self, ids: list[int], body: dict) -> list[int]:
        output = self.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=body["max_tokens"],
            min_new_tokens=body["max_tokens"] if body.get("ignore_eos") else None, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return output[0, len(ids) :].tolist()

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> dict:
        """Of all tokens but the first, as vLLM echoes them."""
        table = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        own = [None, *(table[place, token].item() for place, token in enumerate(ids[1:]))]
        top = [None, *({str(int(row.argmax())): row.max().item()} for row in table[: len(ids) - 1])]
        return {"token_logprobs": own, "top_logprobs": top}

    def complete(self, body: dict, chat: bool) -> Iterator[dict]:
        """The answer as events: pieces of text, then what was used."""
        if "answer" in self.quirks:
            said = self.quirks["answer"](body["messages"][-1]["content"] if chat else body["prompt"])
            yield {"choices": [{"index": 0, **({"message": {"content": said}} if chat else {"text": said})}]}
            yield {"usage": {}}
            return
        ids = self.prompt(body)
        new = self.continuation(ids, body)
        shown = ids + new if body.get("echo") else new
        more = {"logprobs": self.logprobs(shown)} if body.get("echo") and body.get("logprobs") else {}
        pieces = [self.tokenizer.decode([token], skip_special_tokens=True) for token in shown]
        pieces = pieces if body.get("stream") else ["".join(pieces)]
        for piece in pieces:
            told = {"delta" if body.get("stream") else "message": {"content": piece}} if chat else {"text": piece}
            yield {"choices": [{"index": 0, **told, **more}]}
        yield {"choices": [], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}}


class Handler(BaseHTTPRequestHandler):
    served: Served

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        models = {"data": [{"id": name, "max_model_len": WINDOW} for name in self.served.names]}
        self._answer(200, self.served.quirks.get("models", models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.requests.append(body)
        if "status" in self.served.quirks:
            self._answer(*self.served.quirks["status"])
        elif body["model"] not in self.served.names:
            self._answer(404, {"error": {"message": f"The model {body['model']} does not exist."}})
        else:
            events = list(self.served.complete(body, "messages" in body))
            self._stream(events) if body.get("stream") else self._answer(200, events[0] | {"usage": events[1]["usage"]})

    def _answer(self, status: int, content: dict | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def _stream(self, events: list[dict]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events = self.served.quirks.get("events", events)
        lines = [": keepalive", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        self.wfile.write("".join(line + "\r\n\r\n" for line in lines).encode())


@contextmanager
def served(model: torch.nn.Module, tokenizer: object, **settings: object) -> Iterator[Served]:
    """Serve on a free port until the block ends."""
    server = Served(model, tokenizer, **settings)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"served": server}))
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
