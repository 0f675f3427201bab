"""Models that are asked: in this process and behind a URL, against transformers and a server of our own."""

import json
from types import SimpleNamespace

import models
import pytest
import torch
from runs import MemoryRun
from served import served
from transformers import AutoModelForCausalLM

from gsq.codebook import Codebook
from gsq.errors import UserError
from gsq.eval import subject as module
from gsq.eval.kvcache import Scheme
from gsq.eval.subject import Local, Server, load_dense, load_packed
from gsq.export.base import export_run
from gsq.export.dequantize import dequantize
from gsq.model.checkpoint import Checkpoint

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content + '\\n' }}{% endfor %}"
    "{{ 'quick' if enable_thinking is false else 'slow' }}"
)
PROMPT = "Call me Ishmael."
MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.tiny_llama(tmp_path_factory.mktemp("models") / "llama", tied=False)


@pytest.fixture
def local(folder):
    return Local.open(folder, CPU, torch.float32)


@pytest.fixture
def server(folder):
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("enable_thinking is false", "true")
    with served(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer) as server:
        yield server


@torch.no_grad()
def likeliest(folder, prompt, steps):
    """Greedy continuation without any cache, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = models.tiny_tokenizer()(prompt)["input_ids"]
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-steps:]


def test_local_continues_with_the_likeliest_tokens(folder, local):
    answer = local.generate(PROMPT, 12)
    new = likeliest(folder, PROMPT, 12)
    assert answer.text == models.tiny_tokenizer().decode(new, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.new_tokens) == (len(PROMPT), 12)
    assert 0 < answer.seconds_to_first < answer.seconds


def test_a_models_own_settings_only_say_what_ends_an_answer(folder, tmp_path):
    new = likeliest(folder, PROMPT, 12)
    end = next(place for place, token in enumerate(new) if place > 2 and token not in new[:place])
    copy = models.tiny_llama(tmp_path / "own", tied=False)
    own = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "eos_token_id": [2, new[end]]}
    (copy / "generation_config.json").write_text(json.dumps(own))
    local = Local.open(copy, CPU, torch.float32)
    assert local.generate(PROMPT, 12).new_tokens == end + 1
    assert local.generate(PROMPT, 12, ignore_end=True).new_tokens == 12


def test_messages_go_through_the_chat_template_without_thoughts(local):
    assert not local.chats
    with pytest.raises(UserError, match="no chat template"):
        local.generate(MESSAGES, 1)
    local.tokenizer.chat_template = TEMPLATE
    asked = "u:Who are you?\nquick"
    assert local.count(MESSAGES) == local.count(asked) == len(asked)
    assert local.generate(MESSAGES, 8).text == local.generate(asked, 8).text


def test_prompt_and_answer_fit_the_window(local):
    assert local.window == 512
    assert local.generate("a" * 510, 2).new_tokens == 2
    with pytest.raises(UserError, match="510 tokens and an answer of 3 are more than the 512 positions of llama"):
        local.generate("a" * 510, 3)


def test_each_answer_has_a_fresh_cache_of_the_scheme(folder, local):
    plain = local.generate(PROMPT, 12)
    whole = Local.open(folder, CPU, torch.bfloat16)
    kept = Local(whole.model, whole.tokenizer, Scheme.parse("16"))
    assert kept.generate(PROMPT, 12).text == whole.generate(PROMPT, 12).text
    caches = []
    scheme = SimpleNamespace(cache=lambda model: caches.append(Scheme.parse("turbo8").cache(model)) or caches[-1])
    coded = Local(local.model, local.tokenizer, scheme)
    assert coded.generate(PROMPT, 12).text == coded.generate(PROMPT, 12).text
    assert [cache.get_seq_length() for cache in caches] == [len(PROMPT) + 11] * 2
    assert local.generate(PROMPT, 12).text == plain.text


@pytest.mark.parametrize(
    ("form", "codebook"),
    [("humming", Codebook.integer(3, 32)), ("tq", lambda width: Codebook.tq(3, 32, width))],
)
def test_exports_are_decoded(tmp_path, folder, form, codebook):
    run = MemoryRun(folder, {r"layers\..*_proj": codebook})
    export = export_run(run, form, tmp_path / "export")
    dense = AutoModelForCausalLM.from_pretrained(dequantize(export, tmp_path / "dense"), dtype=torch.bfloat16)
    tokens = models.random_tokens()
    for model in (load_dense(export, CPU, torch.bfloat16), load_packed(export, form, CPU, torch.bfloat16)):
        assert torch.equal(model(tokens).logits, dense(tokens).logits)
    assert Local.open(export, CPU, torch.float32).generate(PROMPT, 4).new_tokens == 4


def test_refuses_what_does_not_fit_before_reading_weights(folder, monkeypatch):
    needed = sum(info.numel for info in Checkpoint.open(folder).tensors.values()) * 4 * 1.1
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(module, "available_bytes", lambda: needed - 4)
    with pytest.raises(UserError, match=r"needs .* of memory to generate, and cpu has .*; serve it"):
        Local.open(folder, CPU, torch.float32)
    monkeypatch.setattr(module, "available_bytes", lambda: needed + 4)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        Local.open(folder, CPU, torch.float32)


@pytest.mark.parametrize("prompt", [PROMPT, MESSAGES], ids=["completion", "chat"])
def test_server_and_local_answer_alike(local, server, prompt):
    local.tokenizer.chat_template = TEMPLATE
    remote = Server(server.url + "/v1/")
    assert (remote.name, remote.window) == ("tiny", 512)
    mine, theirs = local.generate(prompt, 12, ignore_end=True), remote.generate(prompt, 12, ignore_end=True)
    assert (theirs.text, theirs.prompt_tokens, theirs.new_tokens) == (mine.text, mine.prompt_tokens, 12)
    assert 0 < theirs.seconds_to_first <= theirs.seconds
    assert server.requests[-1]["temperature"] == 0


def test_server_counts_with_and_without_a_tokenizer(folder, server):
    assert Server(server.url).count(PROMPT) == len(PROMPT)
    assert len(server.requests) == 1
    assert Server(server.url, tokenizer=folder).count(PROMPT) == len(PROMPT)
    assert len(server.requests) == 1


def test_server_says_whether_it_scores_prompts(server):
    assert Server(server.url).scores_prompts()
    server.quirks["status"] = (400, {"error": "echo is not supported"})
    assert not Server(server.url).scores_prompts()


def test_nothing_listens():
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:9/v1 \(.*refused\); start the server"):
        Server("http://127.0.0.1:9")
    with pytest.raises(UserError, match="correct the URL"):
        Server("127.0.0.1:9")


def test_a_model_must_be_named_if_there_are_several(server):
    server.names = ("tiny", "other")
    with pytest.raises(UserError, match=r"names 2 models \(tiny, other\)"):
        Server(server.url)
    assert Server(server.url, "other").generate(PROMPT, 2).new_tokens == 2
    with pytest.raises(UserError, match=r"404: .*does not exist.*asked for model 'third', and names tiny, other"):
        Server(server.url, "third").generate(PROMPT, 2)


def test_a_broken_list_of_models_matters_only_if_none_is_named(server):
    server.quirks["models"] = ""
    assert Server(server.url, "tiny").generate(PROMPT, 2).new_tokens == 2
    with pytest.raises(UserError, match=r"does not list its models \(.*\); say which one to ask"):
        Server(server.url)


@pytest.mark.parametrize(
    ("quirks", "words"),
    [
        ({"status": (500, "out of memory")}, r"v1/completions answered 500: out of memory"),
        ({"status": (400, {"error": {"message": "too long"}})}, "answered 400: .*too long"),
        ({"events": [{"error": {"message": "died"}}]}, "answered: .*died"),
        ({"events": [{"choices": [{"text": "a"}]}]}, "did not say how many tokens"),
    ],
)
def test_errors_of_servers_are_told(server, quirks, words):
    remote = Server(server.url)
    server.quirks |= quirks
    with pytest.raises(UserError, match=words):
        remote.generate(PROMPT, 2)


def test_counting_needs_usage_in_json(server):
    remote = Server(server.url)
    server.quirks["status"] = (200, "<html>")
    with pytest.raises(UserError, match="did not answer in JSON: <html>"):
        remote.count(PROMPT)
    server.quirks["status"] = (200, {"choices": []})
    with pytest.raises(UserError, match="give the model's tokenizer"):
        remote.count(PROMPT)


def test_thoughts_count_as_the_first_token_but_not_as_text(server):
    remote = Server(server.url)
    thought, word = ({"choices": [{"delta": {key: "x"}}]} for key in ("reasoning_content", "content"))
    server.quirks["events"] = [thought, word, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}]
    answer = remote.generate(MESSAGES, 2)
    assert (answer.text, answer.new_tokens) == ("x", 2)
