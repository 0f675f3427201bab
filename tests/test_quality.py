"""Quality of a checkpoint against plain transformers, which holds the whole model and all logits, and lm-eval."""

import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gsq.errors import UserError
from gsq.eval import intervals, quality, text
from gsq.eval.kvcache import Scheme
from gsq.eval.subject import Local
from gsq.model.checkpoint import Checkpoint


class Tokenizer:
    """One token per character."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 90 for letter in text]}


def save_llama(folder, seed, tied=False, vocabulary=96):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_llama(folder / "quantized", 0, tied=True), save_llama(folder / "base", 1)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def direct(checkpoint, tokens):
    """Mean loss of transformers' own model, and log-probabilities `[W * (L - 1), V]` in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    output = model(input_ids=tokens, labels=tokens)
    return output.loss.item(), output.logits[:, :-1].flatten(0, 1).double().log_softmax(-1)


def test_agrees_with_transformers(pair, tokens, monkeypatch):
    monkeypatch.setattr(quality, "LOGIT_BYTES", 96 * 4 * 6 * 7)  # 7 tokens at a time, which does not divide
    result = quality.evaluate(*pair, tokens, batch=2)
    loss, log_q = direct(pair[0], tokens)
    base_loss, log_p = direct(pair[1], tokens)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["base_perplexity"] == pytest.approx(math.exp(base_loss), rel=1e-5)
    assert result["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result["kl_median"] == pytest.approx(kl.median().item(), rel=1e-4)
    assert result["kl_p99"] == pytest.approx(kl.sort().values[math.ceil(0.99 * len(kl)) - 1].item(), rel=1e-4)
    assert result["top1"] == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert (result["tokens"], result["windows"], result["length"]) == (5 * 23, 5, 24)


def test_base_is_at_no_distance_from_itself(pair, tokens):
    result = quality.evaluate(pair[1], pair[1], tokens)
    assert result["kl"] == result["kl_p99"] == 0
    assert result["top1"] == 1
    assert result["perplexity"] == result["base_perplexity"]


def test_base_is_walked_once_for_many(pair, tokens):
    base = quality.final_states(pair[1], tokens)
    reused = quality.compare(quality.final_states(pair[0], tokens), base)
    assert reused == quality.evaluate(*pair, tokens)


def test_without_base_only_perplexity(pair, tokens):
    result = quality.evaluate(pair[0], None, tokens)
    assert set(result) == {"perplexity", "perplexity_low", "perplexity_high", "tokens", "windows", "length"}
    assert result["perplexity"] == quality.evaluate(*pair, tokens)["perplexity"]


def test_progress_counts_layers_of_both(pair, tokens):
    seen = []
    quality.evaluate(*pair, tokens, progress=lambda done, layers: seen.append((done, layers)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_mistakes_are_explained(pair, tokens, tmp_path):
    other = save_llama(tmp_path / "other", 3, vocabulary=128)
    with pytest.raises(UserError, match="vocabulary of 96, its base of 128"):
        quality.evaluate(pair[0], other, tokens)
    with pytest.raises(UserError, match="knows only 96"):
        quality.evaluate(pair[0], None, tokens + 50)
    with pytest.raises(UserError, match="length >= 2"):
        quality.evaluate(pair[0], None, tokens[:, :1])


def test_eval_tokens(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz")
    tokens = quality.eval_tokens(file, Tokenizer(), 2, 10)
    assert tokens.shape == (2, 10)
    assert tokens.flatten().tolist() == [ord(letter) % 90 for letter in "abcdefghijklmnopqrst"]
    with pytest.raises(UserError, match="26 tokens, enough for 2 windows of 10, not 3"):
        quality.eval_tokens(file, Tokenizer(), 3, 10)
    with pytest.raises(UserError, match="plain text"):
        quality.eval_tokens(tmp_path / "none.txt", Tokenizer(), 1, 10)
    with pytest.raises(UserError, match="predict nothing"):
        quality.eval_tokens(file, Tokenizer(), 1, 1)


# Positions and intervals


def scores_of(seed: int, windows: int = 5, predictions: int = 23) -> quality.Scores:
    generator = torch.Generator().manual_seed(seed)
    counted, loss, base_loss, kl = (torch.rand(windows, predictions, generator=generator).double() for _ in range(4))
    return quality.Scores(counted > 0.3, 3 * loss, 3 * base_loss, kl, kl > 0.4)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 70))
def test_positions_share_out_all_predictions(seed, windows, predictions):
    scores = scores_of(seed, windows, predictions)
    if not scores.counted.any():
        return
    rows = quality.by_position(scores)
    whole = quality.summary(scores)
    assert sum(row["tokens"] for row in rows) == whole["tokens"] == int(scores.counted.sum())
    for key, mean in (("loss", math.log(whole["perplexity"])), ("kl", whole["kl"]), ("top1", whole["top1"])):
        assert sum(row["tokens"] * row[key] for row in rows) / whole["tokens"] == pytest.approx(mean)


def test_positions_by_hand():
    scores = scores_of(0)
    for row in quality.by_position(scores):
        before = [n for n in range(23) if row["from"] <= n + 1 <= row["to"]]  # prediction n has n + 1 tokens before it
        picked = [(w, n) for w in range(5) for n in before if scores.counted[w, n]]
        assert row["tokens"] == len(picked)
        assert row["kl"] == pytest.approx(sum(float(scores.kl[place]) for place in picked) / len(picked))
    assert [(row["from"], row["to"]) for row in quality.by_position(scores)] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 23),
    ]


def test_what_does_not_count_has_no_say():
    scores = scores_of(3)
    other = scores.loss.where(scores.counted, float("inf"))
    assert quality.summary(quality.Scores(scores.counted, other)) == quality.summary(
        quality.Scores(scores.counted, scores.loss)
    )


def test_interval_of_a_mean_is_a_bootstraps():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(50, 150, (60,), generator=generator)
    sums = counts * (3 + 0.5 * torch.randn(60, generator=generator))
    low, high = intervals.mean_interval(sums, counts)
    drawn = torch.randint(0, 60, (20000, 60), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    expected = means.quantile(torch.tensor([0.025, 0.975]))
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.08 * (high - low))


def test_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    sums = 2 + torch.randn(4000, 6, generator=generator)  # windows of one token
    found = [intervals.mean_interval(row, torch.ones(6)) for row in sums]
    assert sum(low <= 2 <= high for low, high in found) / 4000 == pytest.approx(0.95, abs=0.012)


def test_one_window_tells_nothing_of_its_spread(pair, tokens):
    assert intervals.mean_interval(torch.ones(1), torch.ones(1)) is None
    assert "perplexity_low" not in quality.evaluate(pair[0], None, tokens[:1])


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423)])
def test_students_quantile_is_the_tables(freedom, quantile):
    assert intervals.student(freedom) == pytest.approx(quantile, rel=0.01)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilsons_ends_are_where_the_score_test_turns(trials, share):
    successes = round(share * trials)
    found = successes / trials
    for end in intervals.wilson(successes, trials):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(found - end) == pytest.approx(intervals.Z * math.sqrt(end * (1 - end) / trials), rel=1e-6)
        else:
            assert found == pytest.approx(end, abs=1e-9)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        intervals.wilson(3, 2)


# Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("text") / "llama")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two documents, one of them shorter than the windows of these tests."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefg,.", k=draw.randint(1, 9))) for _ in range(90)]
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text(f'{{"text": " {" ".join(words[:80])}\\n"}}\n{{"text": "{"  ".join(words[80:84])}"}}\n')
    return path


def documents(file) -> list[str]:
    return [line["text"] for line in map(json.loads, file.read_text().splitlines())]


@torch.no_grad()
def total_loss(folder, document: str, length: int) -> float:
    """Loss of every token of a document behind the `length` tokens before it, as far as its window reaches.

    Transformers' own loss, window by window, with all labels but the predicted ones ignored.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(document)["input_ids"]
    sequence, total = [1, *ids], 0.0
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        window = torch.tensor([sequence[max(0, end - length) : end + 1]])
        labels = window.clone()
        labels[:, : -(end - start)] = -100
        total += float(model(input_ids=window, labels=labels).loss) * (end - start)
    return total


def rolling(folder, file, length, **settings) -> dict:
    given = text.Settings(text=str(file), contexts=[length], mode="rolling", **settings)
    return text.parts(given)[f"perplexity/{length}"](text.Weights(folder))


@pytest.mark.parametrize("length", [16, 50, 500])
def test_rolling_perplexity_is_transformers_loss_of_every_token(folder, file, length):
    result = rolling(folder, file, length)
    texts = documents(file)
    total = sum(total_loss(folder, document, length) for document in texts)
    words = sum(len(re.split(r"\s+", document)) for document in texts)
    tokens = sum(map(len, texts))  # one per letter
    assert (result["tokens"], result["words"]) == (tokens, words)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)


@pytest.mark.parametrize("length", [16, 50])
def test_rolling_perplexity_is_lm_evals(folder, file, length):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    judge = huggingface.HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), max_length=length, batch_size=2)
    texts = documents(file)
    found = judge.loglikelihood_rolling([SimpleNamespace(args=(document,)) for document in texts], disable_tqdm=True)
    words = sum(len(re.split(r"\s+", document)) for document in texts)
    assert rolling(folder, file, length)["word_perplexity"] == pytest.approx(math.exp(-sum(found) / words), rel=1e-4)


@given(st.integers(1, 60), st.integers(1, 20))
def test_rolling_windows_predict_every_token_once(count, length):
    ids = list(range(100, 100 + count))
    tokens, counted = text.rolling_windows(ids, 1, length)
    assert tokens.shape == (-(-count // length), length + 1)
    assert tokens[:, 1:][counted].tolist() == ids
    for row, marks in zip(tokens.tolist(), counted.tolist(), strict=True):
        for place, mark in enumerate(marks, 1):
            if mark:  # what is before it in the window is what is before it in the text, as far as that reaches
                before = [1, *ids][: row[place] - 100 + 1]
                assert row[:place] == before[-place:]


def test_windows_are_those_of_the_plain_command(folder, file, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text(documents(file)[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = quality.eval_tokens(plain, tokenizer, 3, 40)
    part = text.parts(text.Settings(text=str(plain), contexts=[40], windows=3))["perplexity/40"]
    assert torch.equal(part.windows(folder).tokens, tokens)
    expected = quality.evaluate(Checkpoint.open(folder), None, tokens)
    measured = text.measure_file(str(folder), None, plain, 3, 40)
    assert measured | expected == measured
    words = len(documents(file)[0][:120].split()) * 39 / 40
    assert measured["word_perplexity"] == pytest.approx(measured["perplexity"] ** (117 / words))


def test_words_are_cut_behind_the_last(folder, file):
    first = documents(file)[0].split()
    for words in (1, 79, 80, 82):
        settings = text.Settings(text=str(file), words=words, mode="rolling", contexts=[500])
        ids = text.parts(settings)["perplexity/500"].windows(folder)
        found = AutoTokenizer.from_pretrained(folder).decode(ids.tokens[:, 1:][ids.counted])
        wanted = [*first, *documents(file)[1].split()][:words]
        assert "".join(found.split()) == "".join(wanted)


def test_text_that_is_no_use(folder, file, tmp_path):
    with pytest.raises(UserError, match=r"text '.*none.txt' does not exist"):
        text.parts(text.Settings(text=str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(UserError, match="holds no words"):
        text.parts(text.Settings(text=str(tmp_path / "empty.txt")))
    with pytest.raises(UserError, match="does not fill a window of 4000 tokens"):
        text.parts(text.Settings(text=str(file), contexts=[4000]))["perplexity/4000"].windows(folder)


def test_a_compressed_cache_is_measured_against_a_plain_one(folder, file):
    part = text.parts(text.Settings(text=str(file), contexts=[40], chunk=16, mode="rolling"))["perplexity/40"]
    plain = part(text.Weights(folder))
    results = {}
    for name in ("16", "turbo4"):
        local = Local.open(folder, torch.device("cpu"), torch.float32, Scheme.parse(name))
        results[name] = part(text.Weights(folder, local=local))
    assert results["16"]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-3)  # keys are kept in 16 bits
    assert results["16"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["turbo4"]["kl"] > 1e-5
    assert results["turbo4"]["base_perplexity"] == pytest.approx(results["16"]["perplexity"], rel=1e-5)
    assert results["turbo4"]["tokens"] == plain["tokens"]
    assert set(results["turbo4"]) > {"kv_sizes", "positions", "word_perplexity"}
