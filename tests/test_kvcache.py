"""The compressed KV cache: what it stores against float64 references, its bytes, and models that generate with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from gsq.errors import UserError
from gsq.eval.kvcache import Layer, Scheme
from gsq.eval.kvquality import PLAIN, kv_divergence, kv_scores
from gsq.eval.kvstore import FIRST, Rows, Turbo, Turn, Vectors
from gsq.eval.quality import summary
from gsq.levels import sphere_levels
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.rotation import Rotation

CPU = torch.device("cpu")
GAUSSIAN = {2: 0.1175, 3: 0.03454, 4: 0.009497}  # least squared error of a scalar code of N(0, 1): Max, 1960
BITS = st.sampled_from([*range(2, 9), 16])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load(models.tiny_llama(tmp_path_factory.mktemp("kv") / "llama", layers=3))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load(models.tiny_qwen3_5(tmp_path_factory.mktemp("kv") / "qwen"))


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return Skeleton(Checkpoint.open(folder), CPU, dtype).whole()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turn_of(width: int) -> Turn:
    heads = {"hidden_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}
    return Turn.of(LlamaForCausalLM(LlamaConfig(**heads, intermediate_size=8)))


# Schemes


@given(keys=BITS, values=BITS, sinks=st.integers(0, 40), boundary=st.integers(0, 5))
def test_the_text_of_a_scheme_is_read_back(keys: int, values: int, sinks: int, boundary: int):
    scheme = Scheme(keys, values, sinks, boundary)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("turbo4", Scheme(4, 4)),
        ("turbo3", Scheme(3, 3)),
        ("turbo4v2", Scheme(4, 2)),
        ("K8V3", Scheme(8, 3)),
        ("k16v4", Scheme(16, 4)),
        ("16", Scheme(16, 16)),
        ("turbo4v2,sinks=0,boundary=2", Scheme(4, 2, 0, 2)),
    ],
)
def test_schemes_have_their_usual_names(text: str, scheme: Scheme):
    assert Scheme.parse(text) == scheme


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fp8", "unknown KV cache 'fp8'; use turbo4"),
        ("turbo4v2sinks=2", "unknown KV cache"),
        ("turbo4,sink=2", "no option 'sink'; options are sinks, boundary"),
        ("turbo4,key_bits=2", "no option 'key_bits'"),
        ("turbo9", "2 to 8 or 16 bits, not 9"),
        ("k4v1", "2 to 8 or 16 bits, not 1"),
    ],
)
def test_other_schemes_are_refused(text: str, reason: str):
    with pytest.raises(UserError, match=reason):
        Scheme.parse(text)


# What is stored of a vector


def reference(x: np.ndarray, bits: int) -> np.ndarray:
    """Vectors `[n, D]` as they are stored, in float64 and with matrices: rotate, choose, rescale, choose, unrotate."""
    width = x.shape[1]
    signs = np.random.default_rng(42).choice([-1.0, 1.0], size=width)
    rotation, start = np.zeros((width, width)), 0
    for size in (1 << power for power in reversed(range(12)) if width >> power & 1):
        rotation[start : start + size, start : start + size] = hadamard(size) / np.sqrt(size)
        start += size
    rotation *= signs
    y, levels = x @ rotation.T, np.array(sphere_levels(bits, width))
    choose = lambda y, scale: levels[np.abs((y / scale)[..., None] - levels).argmin(-1)]  # noqa: E731
    first = choose(y, np.linalg.norm(y, axis=1, keepdims=True))
    units = choose(y, (y * first).sum(1, keepdims=True) / (first**2).sum(1, keepdims=True))
    return (y**2).sum(1, keepdims=True) / (y * units).sum(1, keepdims=True) * units @ rotation


@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_vectors_are_stored_as_the_method_says(bits: int, width: int):
    x = gaussian(50, width) * torch.logspace(-3, 3, 50)[:, None]
    packed, scales = Turbo(bits).encode(x)
    assert packed.shape == (50, width * bits // 8)
    assert (packed.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.bfloat16, (50,))
    assert packed[0].nbytes + scales[0].nbytes == Turbo(bits).nbytes(width)
    decoded, expected = (
        Turbo(bits).decode(packed, scales).double(),
        torch.from_numpy(reference(x.double().numpy(), bits)),
    )
    error = (decoded - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2**-8  # rounding of the scale; a number on an edge may take the other level of 8 bits


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_the_error_is_that_of_lloyd_max_and_there_is_no_bias(bits: int):
    x = gaussian(4000, 128) * torch.linspace(0.1, 3, 128)  # channels of different size: the rotation's work
    decoded = Turbo(bits).decode(*Turbo(bits).encode(x))
    power = x.square().sum(-1)
    best = GAUSSIAN[bits] / (1 - GAUSSIAN[bits])  # of an unbiased code
    assert ((decoded - x).square().sum(-1) / power).mean().item() == pytest.approx(best, rel=0.08)
    assert torch.allclose((decoded * x).sum(-1) / power, torch.ones(()), atol=2**-8)


def test_zeros_stay_zeros():
    assert not Turbo(3).decode(*Turbo(3).encode(torch.zeros(2, 64))).any()


def test_heads_that_fill_no_bytes_are_refused():
    with pytest.raises(UserError, match="multiple of 8 numbers, not 20"):
        Turbo(4).encode(gaussian(2, 20))


def test_kernels_store_the_same(kernels: torch.device):
    x = gaussian(6, 2, 64)
    stored = [part.cpu() for part in Turbo(3).encode(x.to(kernels))]
    rotated = Rotation("jangtq", 64, 64).rotate(x)
    assert torch.allclose(Turbo(3).decode(*stored), Turbo(3).decode(*(p.to(kernels) for p in stored)).cpu(), atol=1e-6)
    assert torch.allclose((Turbo(3).decode(*stored) * x).sum(-1), rotated.square().sum(-1), rtol=2**-7)


# Storage


def stored_bytes(side: Vectors) -> int:
    """Bytes of all tensors that an object of storage holds, less the room for tokens to come."""
    tensors = [side.center, *(rows.buffer for rows in side.parts)]
    return sum(t.nbytes for t in tensors if t is not None) - sum(rows.room for rows in side.parts)


def pieces(x: Tensor, cuts: list[int]) -> list[Tensor]:
    """`x` `[B, H, T, D]` cut along its tokens."""
    ends = [0, *sorted(cut % x.shape[2] for cut in cuts), x.shape[2]]
    return [x[:, :, start:end] for start, end in pairwise(ends)]


@given(
    length=st.integers(1, 150),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    sinks=st.integers(0, 6),
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    centered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=40)
def test_what_is_stored_depends_on_no_pieces_and_has_the_bytes_that_were_told(
    length: int, cuts: list[int], sinks: int, bits: int, centered: bool, dtype: torch.dtype
):
    x = (gaussian(2, 3, length, 16) + 2).to(dtype)
    codec = None if bits == 16 else Turbo(bits)
    whole, cut = (Vectors(codec, sinks, centered, turn_of(16)) for _ in range(2))
    whole.append(x)
    for piece in pieces(x, cuts):
        cut.append(piece)
    assert torch.equal(whole.read(dtype), cut.read(dtype))
    assert whole.read(dtype).shape == x.shape
    assert whole.nbytes == cut.nbytes == stored_bytes(whole) == whole.nbytes_at(length)
    sixteen = x[:, :, :sinks] if codec else x
    assert torch.equal(whole.read(dtype)[:, :, : sixteen.shape[2]], sixteen.to(whole.whole.data.dtype).to(dtype))
    if codec and length > sinks + FIRST:
        vector = 16 * bits // 8 + 2
        assert whole.nbytes == 2 * 3 * (16 * 2 * min(sinks, length) + (length - sinks) * vector + centered * 16 * 2)


def test_room_for_tokens_to_come_is_small_and_copies_are_few():
    rows, copies = Rows(), 0
    for token in range(2000):
        before = rows.buffer
        rows.append(torch.full((1, 2), token))
        copies += rows.length if rows.buffer is not before else 0
        assert rows.room <= max(16, rows.length / 8) * 2 * 8
    assert torch.equal(rows.data[:, 1], torch.arange(2000))
    assert copies < 12 * 2000


def test_a_center_that_turns_is_found_and_kept_where_keys_do_not_turn():
    turn, mean = turn_of(32), 5 * gaussian(1, 2, 1, 32)
    noise = gaussian(1, 2, 700, 32, seed=1)
    turning = turn(mean.expand(1, 2, 700, 32), 0) + noise
    errors = {}
    for name, keys in (("turning", turning), ("still", mean + noise), ("none", turning)):
        side = Vectors(Turbo(3), 4, centered=name != "none", turn=turn)
        side.append(keys)
        errors[name] = (side.read(torch.float32) - keys)[:, :, 4:].square().mean().item()
        assert side.turned == (name == "turning")
    noise_alone = GAUSSIAN[3] / (1 - GAUSSIAN[3])
    assert errors["turning"] == pytest.approx(errors["still"], rel=0.1)
    assert errors["turning"] < 1.15 * noise_alone
    assert errors["none"] > 10 * noise_alone


def test_turning_is_that_of_the_model_and_can_be_undone():
    turn, x = turn_of(32), gaussian(2, 3, 9, 32)
    angles = torch.arange(4, 13)[:, None] * 10000 ** (-torch.arange(0, 32, 2) / 32)
    rotor = torch.polar(torch.ones_like(angles), angles)
    expected = torch.complex(x[..., :16], x[..., 16:]) * rotor
    assert torch.allclose(turn(x, 4), torch.cat([expected.real, expected.imag], dim=-1), atol=1e-5)
    assert torch.allclose(turn(turn(x, 4), 4, back=True), x, atol=1e-5)


def test_keys_that_the_models_code_does_not_turn_have_a_center_that_stays():
    side, keys = Vectors(Turbo(4), 0, centered=True, turn=turn_of(32)), gaussian(1, 2, 80, 48) + 3
    side.append(keys)
    assert not side.turned
    assert torch.allclose(side.center.float(), keys[:, :, :FIRST].mean(2), atol=0.02)
    assert (side.read(torch.float32) - keys).square().mean() < 0.015


def test_only_models_that_turn_alike_at_all_lengths_have_a_turn(llama, hybrid):
    assert Turn.of(llama) is not None
    assert Turn.of(hybrid) is not None
    small = {"vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert Turn.of(LlamaForCausalLM(LlamaConfig(**small, intermediate_size=8, rope_parameters=rope))) is None
    assert Turn.of(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=16, n_head=2, n_layer=1))) is None


CHANGES: dict[str, tuple[Callable[[Layer], None], Callable[[Tensor], Tensor]]] = {
    "crop": (lambda layer: layer.crop(-30), lambda t: t[:, :, :-30]),
    "crop into the sinks": (lambda layer: layer.crop(-98), lambda t: t[:, :, :-98]),
    "beams": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), lambda t: t[[2, 0, 0]]),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda t: t[[1]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda t: t.repeat_interleave(2, dim=0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sequences_are_cut_and_rearranged_as_they_would_be_uncoded(change: str):
    layer = Layer(Vectors(Turbo(4), 4, centered=True, turn=turn_of(16)), Vectors(Turbo(2), 4))
    states = gaussian(3, 2, 100, 16), gaussian(3, 2, 100, 16, seed=1)
    before = layer.update(*states)
    on_layer, on_tensor = CHANGES[change]
    on_layer(layer)
    left = [on_tensor(t) for t in before]
    assert layer.get_seq_length() == left[0].shape[2]
    assert layer.get_mask_sizes(5) == (layer.get_seq_length() + 5, 0)
    assert all(torch.equal(side.read(torch.float32), t) for side, t in zip(layer.sides, left, strict=True))
    more = [on_tensor(t)[:, :, : 100 - left[0].shape[2] or 9] for t in states]
    after = layer.update(*more)
    assert all(torch.equal(now[:, :, : t.shape[2]], t) for now, t in zip(after, left, strict=True))
    assert after[1].shape[2] == left[1].shape[2] + more[1].shape[2]


def test_tokens_that_follow_a_crop_are_stored_as_ever():
    layer = Layer(Vectors(Turbo(4), 4, centered=True), Vectors(Turbo(2), 4))
    states = gaussian(1, 2, 100, 16).bfloat16(), gaussian(1, 2, 100, 16, seed=1).bfloat16()
    before = layer.update(*states)
    layer.crop(-40)
    after = layer.update(*(t[:, :, 60:] for t in states))
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    with pytest.raises(ValueError, match="as a negative number"):
        layer.crop(3)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert all(torch.equal(old, new) for old, new in zip(before, layer.update(*states), strict=True))


# Models


@pytest.mark.parametrize("name", ["llama", "hybrid"])
@pytest.mark.parametrize("beams", [1, 2])
def test_sixteen_bits_generate_what_the_plain_cache_does(name: str, beams: int, request: pytest.FixtureRequest):
    model, tokens = request.getfixturevalue(name), models.random_tokens(2, 20)
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(tokens)}
    cache = Scheme.parse("16").cache(model)
    generated = model.generate(tokens, past_key_values=cache, **options)
    assert torch.equal(generated, model.generate(tokens, past_key_values=DynamicCache(config=model.config), **options))
    assert cache.get_seq_length() == generated.shape[1] - 1
    assert cache.size().bits_per_value == 16


def test_guessed_tokens_that_were_wrong_are_forgotten(llama):
    tokens = models.random_tokens(1, 12).repeat(1, 3)  # what was seen before is guessed to come again
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    cache = Scheme.parse("16").cache(llama)
    guessed = llama.generate(tokens, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(guessed, llama.generate(tokens, **options))
    assert cache.get_seq_length() == guessed.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_a_coded_cache_is_filled_by_generating(name: str, request: pytest.FixtureRequest):
    model, tokens = request.getfixturevalue(name), models.random_tokens(2, 90)
    cache = Scheme.parse("turbo4v2").cache(model)
    options = {"do_sample": False, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "min_new_tokens": 6}
    generated = model.generate(tokens, past_key_values=cache, **options)
    assert generated.shape == (2, 96)
    layers = sum(isinstance(layer, Layer) for layer in cache.layers)
    keys, values = 95 * (16 * 4 // 8 + 2), 95 * (16 * 2 // 8 + 2)  # the last token was never stored
    extra = 4 * (16 * 2 - 10) + 4 * (16 * 2 - 6) + 16 * 2  # sinks, center
    assert cache.nbytes() == layers * 2 * 2 * (keys + values + extra)
    assert cache.room < 0.5 * cache.nbytes()
    # The next token's logits are those of a forward that has all tokens at once, whose keys are stored likewise
    step = model(generated[:, -1:], past_key_values=cache).logits[:, -1].float()
    fresh = Scheme.parse("turbo4v2").cache(model)
    at_once = model(generated, past_key_values=fresh).logits[:, -1].float()
    assert (step.softmax(-1) - at_once.softmax(-1)).abs().max() < 0.05


def test_layers_without_keys_keep_their_form(hybrid):
    cache = Scheme.parse("turbo4").cache(hybrid)
    kinds = ["full" if isinstance(layer, Layer) else "linear" for layer in cache.layers]
    assert kinds == ["linear", "linear", "linear", "full"]
    assert all(isinstance(layer, LinearAttentionLayer) for layer in cache.layers[:3])
    hybrid(models.random_tokens(1, 80), past_key_values=cache)
    states = [*cache.layers[0].conv_states.values(), *cache.layers[0].recurrent_states.values()]
    assert cache.size().states == 3 * sum(state.nbytes for state in states)
    assert cache.size().numbers == 2 * 2 * 80 * 16
    assert cache.nbytes() == sum(stored_bytes(side) for side in cache.layers[3].sides)


def test_sliding_windows_stay_and_are_counted():
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=24, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    cache = Scheme.parse("turbo4,boundary=1").cache(model)
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)
    assert [layer.sides[0].codec for layer in cache.layers[1:]] == [None, None]
    cache = Scheme.parse("turbo4").cache(model)
    for piece in models.random_tokens(1, 100).split(30, dim=1):
        model(piece, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 23
    assert cache.nbytes() == cache.size(100).nbytes
    sliding, full = 2 * 23 * 16 * 2, 2 * (96 * (16 * 4 // 8 + 2) + 4 * 16 * 2) + 16 * 2
    assert cache.nbytes() == sliding + 2 * full
    assert cache.size().plain_nbytes == sliding + 2 * 2 * 100 * 16 * 2


@given(length=st.integers(1, 300), scheme=st.sampled_from(["turbo4", "turbo4v2,sinks=0", "k16v3,boundary=1", "16"]))
@settings(deadline=None, max_examples=12)
def test_the_formula_of_the_size_is_what_is_measured(llama, length: int, scheme: str):
    short, full = (Scheme.parse(scheme).cache(llama) for _ in range(2))
    llama(models.random_tokens(2, 1), past_key_values=short)
    llama(models.random_tokens(2, length), past_key_values=full)
    assert short.size(length) == full.size(length) == full.size()


def test_boundary_layers_are_whole(llama):
    cache = Scheme.parse("turbo2,boundary=1").cache(llama)
    assert [layer.sides[0].codec for layer in cache.layers] == [None, Turbo(2), None]


def test_turbo4v2_of_a_head_of_64_fits_its_budget():
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_attention_heads=1, head_dim=64, num_hidden_layers=30
    )
    model = LlamaForCausalLM(config).eval()
    cache = Scheme.parse("turbo4v2").cache(model)
    model(torch.ones(1, 512, dtype=torch.long), past_key_values=cache)
    assert cache.size().bits_per_value <= 3.4
    assert cache.size(4096).bits_per_value <= 3.27


# Quality


def test_divergence_falls_with_bits_and_is_nothing_at_sixteen(llama):
    tokens = models.random_tokens(2, 140)
    found = {
        text: kv_divergence(llama, tokens, Scheme.parse(text), chunk=50)
        for text in ("16", "turbo8", "turbo4", "turbo2")
    }
    assert found["16"]["kl"] == 0
    assert found["16"]["perplexity"] == found["16"]["base_perplexity"]
    assert 0 < found["turbo8"]["kl"] < found["turbo4"]["kl"] < found["turbo2"]["kl"]
    assert found["turbo4"]["tokens"] == 2 * 139
    size = found["turbo4"]["kv_sizes"]["140"]
    assert size["plain_bytes"] == 3 * 2 * 2 * 140 * 16 * 2
    assert size["bits_per_value"] == 16 * size["bytes"] / size["plain_bytes"]
    json.dumps(found)


def test_scores_are_those_of_a_forward_without_a_cache(tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "model")
    model, tokens = load(folder, torch.float32), models.random_tokens(2, 75)
    [scores], [cache] = kv_scores(model, tokens, [lambda: Scheme.parse("turbo8").cache(model)], chunk=37)
    known = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    log_probs = known(tokens).logits[:, :-1].double().log_softmax(-1)
    losses = -log_probs.gather(2, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(scores.base_loss, losses.detach(), atol=0.02)  # its cache rounds to 16 bits
    assert cache.get_seq_length() == 75
    assert summary(scores)["windows"] == 2


def test_counted_predictions_alone_count(llama):
    tokens, counted = models.random_tokens(1, 80), torch.zeros(1, 79, dtype=torch.bool)
    counted[:, 70:] = True
    [scores], _ = kv_scores(llama, tokens, [lambda: PLAIN.cache(llama)], counted=counted)
    assert summary(scores)["tokens"] == 9
    assert summary(scores)["perplexity"] == pytest.approx(scores.loss[:, 70:].mean().exp().item())


def bench() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
        return import_module("kv")


def test_uniform_caches_of_the_benchmark_err_by_half_a_step_at_most():
    x, uniform = gaussian(5, 2, 128), bench().Uniform(4)
    packed, ends = uniform.encode(x)
    assert packed[0, 0].nbytes + ends[0, 0].nbytes == uniform.nbytes(128) == 64 + 8
    groups = x.unflatten(-1, (2, 64))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (uniform.decode(packed, ends) - x).abs().unflatten(-1, (2, 64)).amax(-1)
    assert (error <= 0.51 * step + 2e-3).all()


def test_the_benchmark_states_sizes_and_divergence(tmp_path: Path):
    folder = models.tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 8)
    bench().main(str(folder), tmp_path / "text.txt", tmp_path / "out", "turbo4 turbo2", windows=2, length=100, chunk=40)
    rows = {row["cache"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())}
    assert {"turbo4", "turbo2", "turbo4, lenient", "uniform K4 V4", "uniform K2 V2"} <= set(rows)
    assert 0 < rows["turbo4, lenient"]["kl"] < rows["turbo4"]["kl"] < rows["turbo2"]["kl"]
    vector = 2 * 2 * 2 * 4096  # of keys and values: layers, heads
    assert rows["uniform K4 V4"]["kv_sizes"]["4096"]["bytes"] == vector * (16 * 4 // 8 + 4)
    table = (tmp_path / "out" / "table.md").read_text()
    assert (
        f"| turbo4 | {rows['turbo4']['kv_sizes']['4096']['bits_per_value']:.3f} | {rows['turbo4']['kl']:.4f} |" in table
    )
    assert f"| 16 bits | {vector * 128 // 4096 * 32 / 1e3:.0f} |" in table
