"""Accuracy through lm-eval on local data: against likelihoods of our own, and servers that answer by rote."""

import json
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from served import served
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

import datasets
import lm_eval.evaluator
from lm_eval.api.instance import Instance

from gsq.errors import UserError
from gsq.eval import harness
from gsq.eval.intervals import wilson
from gsq.eval.kvcache import Scheme
from gsq.eval.subject import Local, Server

CPU = torch.device("cpu")
SUMS = [{"question": f"What is {n} and {n}?", "answer": f"Add them.\n#### {2 * n}"} for n in range(11, 19)]
WORDS = "salt iron water fire glass rope sand bread lamp tree stone cloud".split()  # noqa: SIM905
CHOICES = [
    {
        "question": f"Which of these has number {n}?",
        "choices": {
            "text": [WORDS[n], WORDS[n + 1] + " and more", WORDS[n + 2], "none"],
            "label": ["A", "B", "C", "D"],
        },
        "answerKey": "ABCD"[n % 4],
    }
    for n in range(10)
]


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.tiny_llama(tmp_path_factory.mktemp("models") / "llama", tied=False)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def local(folder):
    return Local.open(folder, CPU, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # asks pip, which takes seconds
        yield


@pytest.fixture
def arc(tmp_path):
    return harness.Settings(tasks=("arc_easy",), data={"arc_easy": jsonl(tmp_path / "arc.jsonl", CHOICES)})


@torch.no_grad()
def scores(model, row):
    """Log-likelihood in float64 of each choice behind its question."""
    tokenizer = models.tiny_tokenizer()
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    found = []
    for choice in row["choices"]["text"]:
        ids = prompt + tokenizer(" " + choice)["input_ids"]
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(table[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
    return found


def right(row, found):
    return "ABCD"[found.index(max(found))] == row["answerKey"]


def test_choices_are_the_likeliest(model, local, arc):
    harness.check(arc, local)
    [(name, work)] = harness.parts(arc).items()
    result = work(local)
    found = [scores(model, row) for row in CHOICES]
    plain = [right(row, own) for row, own in zip(CHOICES, found, strict=True)]
    by_length = [
        right(row, [score / len(choice) for score, choice in zip(own, row["choices"]["text"], strict=True)])
        for row, own in zip(CHOICES, found, strict=True)
    ]
    assert name == "accuracy/arc_easy"
    assert 0 < sum(plain) < 10
    assert result["metrics"]["acc,none"]["value"] == pytest.approx(sum(plain) / 10)
    assert (result["metric"], result["accuracy"]) == ("acc_norm,none", pytest.approx(sum(by_length) / 10))
    share = sum(by_length) / 10
    assert result["stderr"] == pytest.approx((share * (1 - share) / 9) ** 0.5)
    assert result["interval"] == wilson(sum(by_length), 10)
    assert (result["documents"], result["fewshot"], result["version"]) == (10, 0, 1.0)
    json.dumps(result)


def test_a_server_that_scores_prompts_gives_the_same(model, local, arc, folder):
    with served(model, models.tiny_tokenizer()) as server:
        remote = Server(server.url, tokenizer=folder)
        harness.check(arc, remote)
        work = harness.parts(arc)["accuracy/arc_easy"]
        assert work(remote)["metrics"] == work(local)["metrics"]


def test_likelihoods_that_a_server_cannot_give(model, arc, folder):
    with served(model, models.tiny_tokenizer()) as server:
        with pytest.raises(UserError, match="give the model's folder"):
            harness.check(arc, Server(server.url))
        remote = Server(server.url, tokenizer=folder)
        with pytest.raises(UserError, match="use chat: false"):
            harness.check(arc.model_copy(update={"chat": True}), remote)
        server.quirks["status"] = (400, {"error": "logprobs must be bool"})
        with pytest.raises(UserError, match=r"arc_easy compares likelihoods, and http.* tells none of a prompt"):
            harness.check(arc, remote)


def adds(prompt):
    """Knows sums below 15; what it says of the others is wrong."""
    number = int(prompt.rpartition("What is ")[2].split()[0])
    return f" It is simple.\n#### {2 * number if number < 15 else 7}\n\nQuestion: more"


@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_put_and_judged_as_lm_eval_does(tmp_path, chat):
    data = jsonl(tmp_path / "sums.jsonl", SUMS)
    settings = harness.Settings(tasks=("gsm8k",), fewshot=3, data={"gsm8k": data}, chat=chat)
    with served(None, None, quirks={"answer": adds}) as server:
        remote = Server(server.url)
        harness.check(settings, remote)
        result = harness.parts(settings)["accuracy/gsm8k"](remote)
        asked = [json.dumps(body["messages"]) if chat else body["prompt"] for body in server.requests]
    assert (result["metric"], result["accuracy"], result["documents"]) == ("exact_match,flexible-extract", 0.5, 8)
    assert result["metrics"]["exact_match,strict-match"]["value"] == 0.5
    assert result["fewshot"] == 3
    for prompt in asked:
        questions = [part.split()[0] for part in prompt.split("What is ")[1:]]
        assert len(questions) == len(set(questions)) == 4  # no question is its own example


def test_examples_come_from_the_training_file(tmp_path):
    files = {"train": jsonl(tmp_path / "train.jsonl", SUMS[:3]), "test": jsonl(tmp_path / "test.jsonl", SUMS[3:])}
    settings = harness.Settings(tasks=("gsm8k",), fewshot=2, limit=4, data={"gsm8k": files})
    with served(None, None, quirks={"answer": adds}) as server:
        result = harness.parts(settings)["accuracy/gsm8k"](Server(server.url))
        numbers = [[int(part.split()[0]) for part in body["prompt"].split("What is ")[1:]] for body in server.requests]
    assert result["documents"] == 4
    assert sorted(asked for *_, asked in numbers) == [14, 15, 16, 17]
    assert all(set(examples) < {11, 12, 13} for *examples, _ in numbers)


def test_groups_read_local_data(tmp_path):
    subjects = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health"]
    subjects += ["history", "law", "math", "other", "philosophy", "physics", "psychology"]
    rows = [
        {"question": f"{subject} {n}", "options": ["yes", "no"], "answer": "AB"[n % 2], "category": subject,
         "cot_content": "A: Let's think. The answer is (A).", "question_id": n, "answer_index": n % 2, "src": "own"}
        for subject in subjects for n in range(3 if subject == "math" else 2)
    ]  # fmt: skip
    files = {split: jsonl(tmp_path / f"{split}.jsonl", rows) for split in ("validation", "test")}
    settings = harness.Settings(tasks=("mmlu_pro",), fewshot=1, data={"mmlu_pro": files})
    with served(None, None, quirks={"answer": lambda prompt: " The answer is (A)."}) as server:
        result = harness.parts(settings)["accuracy/mmlu_pro"](Server(server.url))
    assert (result["metric"], result["documents"]) == ("exact_match,custom-extract", 29)
    assert result["accuracy"] == pytest.approx(15 / 29)
    assert result["fewshot"] == 1


@pytest.fixture
def coded(local):
    caches = []
    scheme = Scheme.parse("turbo3")
    counting = SimpleNamespace(cache=lambda model: caches.append(scheme.cache(model)) or caches[-1], caches=caches)
    return Local(local.model, local.tokenizer, counting)


@torch.no_grad()
def test_likelihoods_attend_to_what_the_cache_stored(coded, local):
    context, target = "long ago " * 12, " there was a city"
    request = Instance("loglikelihood", {}, (context, target), 0)
    [(stored, _)] = harness.CachedModel(coded, 1).loglikelihood([request])
    [(plain, _)] = harness.CachedModel(local, 1).loglikelihood([request])
    ids = local.tokenizer(context + target)["input_ids"]
    cache = Scheme.parse("turbo3").cache(local.model)
    table = local.model(torch.tensor([ids[:-1]]), past_key_values=cache).logits[0].double().log_softmax(-1)
    first = len(local.tokenizer(context.rstrip())["input_ids"])
    expected = sum(table[place - 1, ids[place]].item() for place in range(first, len(ids)))
    assert stored == pytest.approx(expected, abs=1e-4)
    assert abs(stored - plain) > 1e-2
    assert len(coded.scheme.caches) == 1


def test_generations_use_a_fresh_cache_each(coded):
    prompts = ["A tale of two cities " * 4, "It was the best of times"]
    requests = [Instance("generate_until", {}, (prompt, {"until": ["~~"], "max_gen_toks": 8}), 0) for prompt in prompts]
    texts = harness.CachedModel(coded, batch=4).generate_until(requests)
    assert texts == [coded.generate(prompt, 8).text for prompt in prompts]
    assert len({id(cache) for cache in coded.scheme.caches}) == 4


def test_mistakes_are_found_before_work(local):
    with pytest.raises(UserError, match=r"gsm8k: /nowhere.jsonl does not exist"):
        harness.parts(harness.Settings(tasks=("gsm8k",), data={"gsm8k": "/nowhere.jsonl"}))
    with pytest.raises(UserError, match=r"accuracy.data: piqa is none of the tasks gsm8k"):
        harness.parts(harness.Settings(tasks=("gsm8k",), data={"piqa": "/nowhere.jsonl"}))
    with pytest.raises(UserError, match=r"no data for gsm8k \(.*data: {gsm8k: {train: FILE.jsonl, test: FILE.jsonl}}"):
        harness.check(harness.Settings(tasks=("gsm8k",)), local)


def test_unknown_tasks(monkeypatch):
    manager = harness._build_manager("gsm8k")  # in place of the index of all tasks, which takes seconds
    monkeypatch.setattr(harness, "_manager", lambda folder: manager)
    with pytest.raises(UserError, match=r"has no task 'gsm9k'; short names: gsm8k, ifeval"):
        harness.parts(harness.Settings(tasks=("gsm8k", "gsm9k")))
    tagged = harness.parts(harness.Settings(tasks=("math_word_problems",)))
    assert "accuracy/gsm8k" in tagged
    assert len(tagged) > 1


@pytest.mark.parametrize("name", harness.BENCHMARKS)
def test_lm_eval_has_all_benchmarks(name):
    names = harness.task_names((name,))
    assert names == list(harness.BENCHMARKS[name][1])


def test_summary_is_by_task():
    cells = {
        f"accuracy/{task}": {"task": task, "accuracy": accuracy, "interval": None}
        for task, accuracy in {"a": 0.5, "b": 0.7, "c": None}.items()
    }
    total = harness.summary(cells)
    assert total["mean"] == pytest.approx(0.6)
    assert total["tasks"]["b"] == {"accuracy": 0.7, "interval": None}
