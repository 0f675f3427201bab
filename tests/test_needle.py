"""Prompts of exact length with a needle at its place, and how answers are judged."""

import re
from bisect import bisect

import matplotlib.image
import models
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from gsq.errors import UserError
from gsq.eval import needle
from gsq.eval.filler import filled, random_words, read_text, sentence_starts, turned
from gsq.eval.intervals import wilson
from gsq.eval.subject import Answer, Local

FORMS = ("chat", "completion")
CODE = re.compile(r"code is (\d{6})\.")
TEXT = random_words(3000, 1)


class Reader:
    """Counts by a function and answers with the code it reads in the prompt, if its place lets it."""

    name, window, chats, device = "reader", None, True, None

    def __init__(self, count=len, sees=lambda share: True, say="It is {}."):
        self.tokens, self.sees, self.say, self.prompts = count, sees, say, []

    def count(self, prompt):
        return self.tokens(prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt))

    def generate(self, prompt, max_tokens, ignore_end=False):
        self.prompts.append(prompt)
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        found = CODE.search(text)
        seen = self.sees(found.start() / len(text))
        return Answer(self.say.format(found[1]) if seen else "I do not know.", self.count(prompt), 3, 0.1, 0.2)


@pytest.fixture(scope="module")
def merging():
    """Counts the tokens of a byte-pair tokenizer with real merges, trained on the text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, needle.NEEDLE, needle.COMPLETION], trainer)
    return lambda text: len(tokenizer.encode(text).ids)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(100, 1500), depth=st.integers(0, 100), seed=st.integers(0, 99), form=st.sampled_from(FORMS)
)  # fmt: skip
def test_prompts_are_as_long_as_asked_for(merging, tokens, depth, seed, form):
    reader = Reader(merging)
    prompt = needle.haystack(reader, turned(TEXT, seed), "123456", tokens, depth, form)
    assert reader.count(prompt) in (tokens, tokens - 1)  # a merge may skip a number
    text = prompt if form == "completion" else prompt[0]["content"]
    assert text.count(needle.NEEDLE.format(code=123456)) == 1


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 150))
def test_filled_never_exceeds_and_misses_by_less_than_a_character(data, tokens):
    """Tokens of one to three per character: the longest text that fits, however unevenly they are spread."""
    costs = data.draw(st.lists(st.integers(1, 3), min_size=20, max_size=120))
    text = "".join("abc"[cost - 1] for cost in costs)
    reader = Reader(lambda prompt: 1 + sum("abc".index(letter) + 1 for letter in prompt))
    totals = [1 + sum(costs[:length]) for length in range(len(costs) + 1)]
    assume(totals[-1] > tokens)
    assert filled(str, text, tokens, reader) == text[: bisect(totals, tokens) - 1]


def test_filled_refuses_what_cannot_be_done():
    with pytest.raises(UserError, match="fills a context of 10 tokens, not of 11"):
        filled(str, "0123456789", 11, Reader())
    with pytest.raises(UserError, match="question alone has 4 tokens"):
        filled(lambda text: "what" + text, "0123456789", 3, Reader())


def test_filled_needs_few_counts(merging):
    calls = []
    reader = Reader(lambda text: calls.append(text) or merging(text))
    filled(str, TEXT, 2000, reader)
    assert len(calls) < 15


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 4000), depth=st.integers(0, 100))
def test_needle_stands_at_the_nearest_border_of_sentences(length, depth):
    text = TEXT[:length]
    whole = needle.insert(text, "NEEDLE.", sentence_starts(TEXT), depth)
    before, after = whole.split("NEEDLE.")
    assert before.rstrip() + after.lstrip() in (text.rstrip(), before.rstrip() + text[len(before.rstrip()) :].lstrip())
    borders = [0, length, *(place for place in range(1, length) if text[place - 1] == "\n")]
    best = min(abs(border - length * depth / 100) for border in borders)
    assert abs(min(len(before), length) - length * depth / 100) == best


@given(seed=st.integers(0, 500))
def test_turned_text_has_each_sentence_once(seed):
    text = TEXT[:2000]
    assert sorted(turned(text, seed).split("\n")) == sorted(text.split("\n"))


def test_turned_texts_differ():
    assert len({turned(TEXT, seed)[:40] for seed in range(20)}) > 15


def test_one_part_per_cell_and_all_codes_found(file):
    settings = needle.Settings(text=file, contexts=(400, 600), depths=(10, 50, 90), trials=2)
    reader = Reader()
    results = {name: work(reader) for name, work in needle.parts(settings).items()}
    assert list(results) == [f"needle/{context}/{depth}" for context in (400, 600) for depth in (10, 50, 90)]
    cell = results["needle/600/90"]
    assert (cell["hits"], cell["trials"], cell["accuracy"], cell["interval"]) == (2, 2, 1, wilson(2, 2))
    assert [answer["prompt_tokens"] for answer in cell["answers"]] == [584, 584]
    codes = [answer["code"] for result in results.values() for answer in result["answers"]]
    assert len(set(codes)) == len(codes) == 12
    again = Reader()
    needle.parts(settings)["needle/600/90"](again)
    assert again.prompts == reader.prompts[-2:]


def test_depth_is_where_the_needle_stands(file):
    settings = needle.Settings(text=file, contexts=(3000,), depths=(10, 25, 50, 75, 90), trials=4)
    results = {name: work(Reader(sees=lambda share: share < 0.6)) for name, work in needle.parts(settings).items()}
    assert [cell["hits"] for cell in results.values()] == [4, 4, 4, 0, 0]
    total = needle.summary(results)
    assert (total["hits"], total["trials"], total["interval"]) == (12, 20, wilson(12, 20))
    assert total["contexts"] == {"3000": {key: total[key] for key in ("hits", "trials", "accuracy", "interval")}}


SAYINGS = {"{}": 1, "the code, {}, of course": 1, "{0:.5}": 0, "12 {0:.3} {0:.3}": 0}


@pytest.mark.parametrize(("say", "hits"), SAYINGS.items())
def test_only_the_whole_code_counts(file, say, hits):
    settings = needle.Settings(text=file, contexts=(500,), depths=(50,), trials=1)
    assert needle.parts(settings)["needle/500/50"](Reader(say=say))["hits"] == hits


def test_a_model_that_completes_text_can_answer(file):
    reader = Reader()
    needle.parts(needle.Settings(text=file, contexts=(500,), depths=(50,), trials=1))["needle/500/50"](reader)
    assert reader.prompts[0].endswith("Answer: The verification code is")
    needle.parts(needle.Settings(text=file, contexts=(500,), depths=(50,), form="chat"))["needle/500/50"](reader)
    assert [message["role"] for message in reader.prompts[1]] == ["user"]


def test_runs_on_a_model(file, tmp_path):
    local = Local.open(models.tiny_llama(tmp_path / "llama"), torch.device("cpu"), torch.float32)
    settings = needle.Settings(text=file, contexts=(400,), depths=(50,), trials=1, max_tokens=4)
    cell = needle.parts(settings)["needle/400/50"](local)
    assert cell["answers"][0]["prompt_tokens"] == 396


def test_mistakes_are_found_before_work(file, tmp_path):
    with pytest.raises(UserError, match=r"needle.text '.*none.txt' does not exist"):
        needle.parts(needle.Settings(text=str(tmp_path / "none.txt")))
    with pytest.raises(ValidationError):
        needle.Settings(text=file, depths=(101,))
    reader = Reader()
    reader.window = 1024
    needle.check(needle.Settings(text=file, contexts=(512, 1024)), reader)
    with pytest.raises(
        UserError, match=r"needle.contexts: reader takes 1024 tokens, prompt and answer together, not 1025"
    ):
        needle.check(needle.Settings(text=file, contexts=(512, 1025)), reader)


def test_reads_no_more_than_the_context_needs(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 100_000)
    assert 10_000 < len(read_text(str(path), "x", 1000)) < 50_000


def test_heat_map_is_brighter_where_more_was_found(tmp_path):
    def cell(context, depth, hits):
        return {"context": context, "depth": depth, "hits": hits, "trials": 4, "accuracy": hits / 4}

    def brightness(*cells):
        needle.draw({str(place): each for place, each in enumerate(cells)}, tmp_path / "map.png", title="tiny")
        return matplotlib.image.imread(tmp_path / "map.png")[..., :3].mean()

    grid = [(context, depth) for context in (512, 1024) for depth in (10, 90)]
    none, half, all_found = (brightness(*(cell(*place, hits) for place in grid)) for hits in (0, 2, 4))
    assert none + 0.05 < half < all_found - 0.05
    assert brightness(*(cell(*place, 4) for place in reversed(grid))) == all_found
    assert brightness(*(cell(*place, 0) for place in grid[1:])) > none
