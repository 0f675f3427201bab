"""Quality of a checkpoint against plain transformers, which holds the whole model and all logits."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gsq.errors import UserError
from gsq.eval import quality
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
    assert set(result) == {"perplexity", "tokens", "windows", "length"}
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
