"""Speed and samples: what is made of answers whose times are known, and of a real model's."""

import math
import mmap
import time

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gsq.errors import UserError
from gsq.eval import samples, speed
from gsq.eval.filler import random_words
from gsq.eval.subject import Answer, Local

CPU = torch.device("cpu")


class Timed:
    """Answers in given times; one token per character."""

    name, window, chats, device = "timed", 512, False, None

    def __init__(self, *times, new=None):
        self.times, self.new, self.prompts = list(times), new, []

    def count(self, prompt):
        return len(prompt)

    def generate(self, prompt, max_tokens, ignore_end=False):
        assert ignore_end
        self.prompts.append(prompt)
        return Answer("x", len(prompt), self.new or max_tokens, *self.times.pop(0))


def test_rates_are_medians_without_the_warm_up():
    times = [(9.0, 99.0), (1.0, 3.0), (2.0, 3.0), (4.0, 8.0), (0.5, 1.5)]
    settings = speed.Settings(contexts=(120,), new_tokens=20, repeats=4)
    subject = Timed(*times)
    result = speed.parts(settings)["speed/120"](subject)
    prompt = [100 / first for first, _ in times[1:]]
    generation = [19 / (last - first) for first, last in times[1:]]
    for name, values in (("prompt", prompt), ("generation", generation), ("seconds_to_first", [1, 2, 4, 0.5])):
        assert result[name]["values"] == pytest.approx(values)
        quartiles = [result[name][key] for key in ("q25", "median", "q75")]
        assert quartiles == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert result["prompt_tokens"] == [100] * 4
    assert len({text[:8] for text in subject.prompts}) == 5
    assert (result["device"], result["memory_bytes"]) == (None, None)
    total = speed.summary({"speed/120": result})["120"]
    assert (total["prompt"], total["generation"]) == pytest.approx((np.median(prompt), np.median(generation)))


def test_a_server_that_stops_at_once_has_no_speed_of_writing():
    settings = speed.Settings(contexts=(100,), repeats=1, warmup=0)
    result = speed.parts(settings)["speed/100"](Timed((1.0, 1.0), new=1))
    assert result["generation"] is None
    assert speed.summary({"speed/100": result})["100"]["generation"] is None


def test_runs_on_a_model(tmp_path):
    local = Local.open(models.tiny_llama(tmp_path / "llama"), CPU, torch.float32)
    settings = speed.Settings(contexts=(64, 128), new_tokens=4, repeats=2)
    results = {name: work(local) for name, work in speed.parts(settings).items()}
    assert list(results) == ["speed/64", "speed/128"]
    for context, result in zip((64, 128), results.values(), strict=True):
        assert (result["prompt_tokens"], result["new_tokens"]) == ([context - 4] * 2, [4] * 2)
        assert all(result[key]["median"] > 0 for key in ("prompt", "generation", "seconds_to_first"))
        assert result["memory_bytes"] >= result["memory_before_bytes"] > 10e6
        assert result["device"].startswith("cpu")


def test_peak_memory_of_a_cpu_sees_what_is_gone_again():
    with speed.PeakMemory(CPU) as memory:
        block = torch.frombuffer(mmap.mmap(-1, 40 << 20), dtype=torch.uint8)  # fresh pages: freed ones are kept
        block.fill_(1)
        time.sleep(5 * speed.INTERVAL)
        del block
    assert 35e6 < memory.peak - memory.before < 100e6


def test_settings_that_cannot_be_timed():
    with pytest.raises(ValidationError):
        speed.Settings(new_tokens=1)
    with pytest.raises(UserError, match=r"speed.contexts: timed takes 512 tokens"):
        speed.check(speed.Settings(contexts=(1024,)), Timed())


class Writer(Timed):
    def generate(self, prompt, max_tokens, ignore_end=False):
        assert not ignore_end
        self.prompts.append(prompt)
        return Answer("so it goes so it goes", self.count(prompt), 6, 1.0, 2.0)

    def count(self, prompt):
        return len(prompt if isinstance(prompt, str) else prompt[0]["content"])


@pytest.mark.parametrize("chats", [False, True])
def test_samples_stand_behind_text(tmp_path, chats):
    (tmp_path / "text.txt").write_text(random_words(500, 0))
    settings = samples.Settings(contexts=(0, 400), text=str(tmp_path / "text.txt"), max_tokens=50)
    writer = Writer()
    writer.chats = chats
    results = {name: work(writer) for name, work in samples.parts(settings).items()}
    assert list(results) == [f"samples/{context}/{name}" for context in (0, 400) for name in samples.PROMPTS]
    bare, long = results["samples/0/story"], results["samples/400/story"]
    assert long["prompt_tokens"] == 350
    assert bare["prompt"] == long["prompt"] == samples.PROMPTS["story"]
    assert long["text"] == "so it goes so it goes"
    texts = [prompt[0]["content"] if chats else prompt for prompt in writer.prompts]
    endings = [asked if chats else asked + "\nAnswer:" for asked in samples.PROMPTS.values()]
    assert all(text.endswith(ending) for text, ending in zip(texts, endings * 2, strict=True))
    assert texts[0].startswith(samples.PROMPTS["explain"] if chats else "Question: ")
    assert samples.summary(results)["400"] == long["distinct"] == samples.distinct("so it goes so it goes")


def test_own_prompts_and_a_bare_context_need_no_text():
    result = samples.parts(samples.Settings(contexts=(0,), prompts=("Say hello.",), text="nowhere"))
    assert list(result) == ["samples/0/Say hello."]
    assert result["samples/0/Say hello."](Writer())["prompt"] == "Say hello."


@given(words=st.lists(st.sampled_from("abc"), max_size=30))
def test_distinct_is_the_share_of_different_ngrams(words):
    shares = samples.distinct(" ".join(words))
    for n in (1, 2, 3, 4):
        ngrams = [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]
        if ngrams:
            assert math.isclose(shares[str(n)], len(set(ngrams)) / len(ngrams))
        else:
            assert shares[str(n)] is None


def test_loops_have_few_distinct_ngrams():
    assert samples.distinct("the end " * 50)["4"] < 0.03
    assert samples.distinct("each of these words stands here but once")["4"] == 1
