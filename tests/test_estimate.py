"""What is said of a run before it starts, against what it then takes; and runs that are refused."""

from __future__ import annotations

import random
import string
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from test_plan_presets import MOE, skeleton_of
from torch import nn
from typer.testing import CliRunner

from gsq import hardware, memory, train
from gsq.calib.stream import Stream
from gsq.cli import app
from gsq.codebook import Codebook
from gsq.config import Config, load_config, parse_config
from gsq.errors import UserError
from gsq.estimate.fit import check_fit, estimated, micro_batch, outlined, refuse_unfit, rooms
from gsq.estimate.pace import Pace
from gsq.estimate.places import DEVICE, FAR, HOST, NEAR
from gsq.estimate.report import Estimate
from gsq.estimate.search import Search
from gsq.estimate.shapes import logits_per_weight
from gsq.hardware import GPUS, Hardware, available_bytes, measure
from gsq.memory import Batch, Memory
from gsq.model.checkpoint import Checkpoint
from gsq.model.skeleton import Skeleton
from gsq.prepare import opened, plan_of
from gsq.quantize import LayerWork
from gsq.ranks import Ranks
from gsq.trace import Counter, Outline, Work
from gsq.train import make_recipe

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
KB = 1 << 10
GB = 1e9
CONFIGS = {  # models and what their runs differ in
    "dense": (models.tiny_llama, {}),
    "experts": (models.tiny_qwen3_moe, {}),
    "modules": (models.tiny_llama, {"refine.stage": "module", "refine.target": "layer"}),
    "hessian": (models.tiny_qwen3_moe, {"refine.objective": "hessian"}),
}
MACHINE = Hardware("a machine", host=100 * GB, accelerator=None, disk=100 * GB, base=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("estimate")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(random.Random(0).choices(string.ascii_letters + " ", k=60_000)))
    return path


def source_of(folder: Path, kind: str) -> Path:
    """The model of a kind of run, written once."""
    build = CONFIGS[kind][0]
    path = folder / build.__name__
    return path if path.exists() else build(path)


def config_of(folder: Path, kind: str, text: Path | str = "self", **settings: object) -> Config:
    """A config with dotted settings; dots are written as two underscores."""
    content = {
        "model": {"name": str(source_of(folder, kind))},
        "plan": {"rules": [{"match": r"layers\.\d+\..*(_proj|experts)", "bits": 2, "group_size": 32}]},
        "calib": {"source": str(text), "windows": 24, "length": 64, "validation": 8, "batch": 2},
        "init": {"polish": 0},
        "refine": {"steps": 1, "windows": 8, "checks": 1},
        "export": {"format": None},
        "dtype": "float32",
        "run": str(folder / "run"),
    }
    for key, value in {**CONFIGS[kind][1], **{k.replace("__", "."): v for k, v in settings.items()}}.items():
        section, name = key.split(".")
        content.setdefault(section, {})[name] = value
    return parse_config(content)


def estimate_of(config: Config, machine: Hardware = MACHINE) -> Estimate:
    skeleton = opened(config, CPU)
    return Estimate(config, skeleton, outlined(config, skeleton), machine.limited(config))


# A layer without weights


def test_products_are_counted_forward_and_back(folder: Path):
    source = Checkpoint.open(source_of(folder, "dense"))
    outline, tokens, length = Outline(source, torch.float32), 3 * 32, 32
    layer = outline.load_layer(0)
    linear = {f"{path}.weight": m.weight for path, m in layer.named_modules() if isinstance(m, nn.Linear)}
    weights = sum(weight.numel() for weight in linear.values())
    attention = 4 * tokens * length * models.HIDDEN  # scores and their products with values
    assert outline.trace(0, 3, length).work.exact == 2 * tokens * weights + attention
    last = "mlp.down_proj.weight"
    back = outline.trace(0, 3, length, [last]).work.exact - outline.trace(0, 3, length).work.exact
    assert back == 2 * tokens * linear[last].numel()  # its gradient, and none of what it reads


def test_what_is_alive_at_once_is_counted():
    counter, x = Counter(), torch.zeros(KB)
    counter = Counter(x)
    with counter:
        y = x + 1  # 4 kB
        z = (y * 2).view(2, -1)  # 8
        del y
        z = z + 1  # 8: two of them
        assert counter.trace.peak == 8 * KB
        torch.cat([z, z, z])  # 4 + 12
    assert counter.trace.peak == 16 * KB
    assert counter.trace.work.calls == 4.5


def test_linears_that_read_one_tensor_are_found(folder: Path):
    inputs = Outline(Checkpoint.open(source_of(folder, "dense")), torch.float32).trace(0, 2, 16).inputs
    attention = [inputs[f"self_attn.{name}_proj"] for name in "qkvo"]
    mlp = [inputs[f"mlp.{name}_proj"] for name in ("gate", "up", "down")]
    assert attention[0] == attention[1] == attention[2]
    assert mlp[0] == mlp[1]
    assert len({*attention, *mlp}) == 4


@pytest.mark.parametrize("build", [models.tiny_qwen3_5_moe, models.tiny_qwen3, models.tiny_qwen3_5])
def test_activations_are_those_of_a_real_run(folder: Path, build):
    """Linear and full attention, experts, norms: the same operations with and without values."""
    source = Checkpoint.open(build(folder / f"real_{build.__name__}", layers=2))
    real, outline = Skeleton(source, CPU, torch.bfloat16), Outline(source, torch.bfloat16)
    hidden, kwargs = real.embed(models.random_tokens(4, 128))
    for index in range(2):
        layer, traced = real.load_layer(index), outline.trace(index, 4, 128)
        counter = Counter(hidden, *layer.parameters())
        with torch.no_grad(), counter:
            real.run_layer(layer, hidden, kwargs[index])
        assert traced.peak == pytest.approx(counter.trace.peak, rel=0.15)
        flops = [trace.work.flops + trace.work.exact for trace in (traced, counter.trace)]
        if traced.routed:
            assert traced.routed == 4 * 128 * models.MOE["num_experts_per_tok"]
        else:
            assert flops[0] == pytest.approx(flops[1], rel=0.02)


def test_a_model_that_asks_for_values(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def asks(self: Skeleton, layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        return hidden[hidden.sum(-1).nonzero()]

    monkeypatch.setattr(Outline, "run_layer", asks)
    config = config_of(folder, "dense", memory__host_gb=4)
    skeleton = opened(config, CPU)
    with pytest.raises(UserError, match="LlamaForCausalLM does not run without weights"):
        estimate_of(config).seconds()
    refuse_unfit(config, skeleton, folder)
    assert rooms(config, skeleton, outlined(config, skeleton), folder).host == 2 * GB


# Memory


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_handed_out_is_foreseen(
    kind: str, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "SMALL", KB)
    config, made = config_of(folder, kind, text), []
    monkeypatch.setattr(train, "Memory", lambda *given: made.append(Memory(*given)) or made[0])
    train.train(config, tmp_path / "run")
    expected = estimate_of(config).working.most(NEAR, FAR)
    assert made[0].most["host"] == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_layer_at_work_holds_what_is_foreseen(kind: str, folder: Path):
    """All tensors of one layer's work, temporaries included, counted as they come and go."""
    config = config_of(folder, kind, init__polish=1)
    skeleton = opened(config, CPU)
    found = estimate_of(config)
    tokens, batch = models.random_tokens(config.calib.windows, config.calib.length), Batch(config.calib.batch)
    counter = Counter()
    with counter:
        share = Ranks().share(len(tokens))
        stream, originals = (Stream(skeleton, tokens, batch, share) for _ in range(2))
        entries = found.plan.targets(0)
        prefix = skeleton.layer_names[0] + "."
        codebooks = {entry.name.removeprefix(prefix): entry.codebook for entry in entries}
        given = found.shapes.needs_original and originals
        work = LayerWork(
            0, skeleton.load_layer(0), stream, given or None, codebooks, make_recipe(config), lambda *_, **__: None,
            Ranks(),
        )  # fmt: skip
        work.run()
    expected = max(
        sum(item.bytes for item in held) for point, held in found.working.moments.items() if "layer" in point
    )
    assert counter.trace.peak == pytest.approx(expected, rel=0.25)


def test_a_small_budget_puts_hidden_states_into_files_and_changes_no_byte(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "SMALL", KB)
    config, made = config_of(folder, "dense", text, memory__disk_dir=str(tmp_path / "scratch")), []
    monkeypatch.setattr(train, "Memory", lambda *given: made.append(Memory(*given)) or made[-1])
    needed = estimate_of(config).working.fixed_host
    for name, host in (("large", 100 * GB), ("small", needed + 100 * KB)):
        machine = replace(MACHINE, host=host)
        monkeypatch.setattr(Hardware, "here", lambda *_, machine=machine: machine)
        train.train(config, tmp_path / name)
    assert made[0].most["file"] == 0
    assert made[1].most["file"] > 100 * KB
    assert made[1].most["host"] <= 100 * KB
    layers = [sorted((tmp_path / name / "layers").iterdir()) for name in ("large", "small")]
    assert [path.read_bytes() for path in layers[0]] == [path.read_bytes() for path in layers[1]]
    assert len(layers[0]) == 2


def test_more_of_anything_takes_more(folder: Path):
    base = {"calib__windows": 24, "calib__length": 32, "refine__steps": 2, "refine__windows": 8, "init__polish": 1}
    speed = GPUS["h100"].speed
    machine = replace(MACHINE, speed=replace(speed, ahead=False))
    plain = estimate_of(config_of(folder, "experts", **base), machine)
    more_of = {
        "calib__windows": 96,
        "calib__length": 64,
        "refine__steps": 8,
        "refine__windows": 16,
        "init__polish": 3,
    }
    for key, value in more_of.items():
        more = estimate_of(config_of(folder, "experts", **base | {key: value}), machine)
        assert more.total > plain.total
        holds = [e.working.most(DEVICE, NEAR, FAR, HOST) for e in (more, plain)]
        assert holds[0] > holds[1] or key in ("refine__steps", "init__polish", "refine__windows")
    four = estimate_of(config_of(folder, "experts", **base), replace(machine, processes=4, local=4))
    assert four.shapes.stream * 4 == plain.shapes.stream
    assert four.total < plain.total


def test_processes_of_a_machine_share_its_memory(folder: Path):
    config = config_of(folder, "dense")
    for local, share in ((1, 100), (4, 25)):
        machine = replace(MACHINE, processes=8, local=local)
        found = estimate_of(config, machine)
        assert found.working.rooms(machine).host == share * GB - found.working.fixed_host


# Budgets


def test_budgets_are_those_of_the_config(folder: Path):
    config = config_of(folder, "dense", memory__host_gb=3, memory__device_gb=2)
    assert MACHINE.limited(config).host == 3 * GB
    assert MACHINE.limited(config).accelerator is None  # a CPU has none
    assert replace(MACHINE, accelerator=9 * GB).limited(config).accelerator == 2 * GB


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"host": 1e5}, r"each of 1 processes needs .*100\.00 kB \(memory\.host_gb\): in layer 0, .*calib\.batch"),
        ({"accelerator": 1e5}, r"each accelerator, and may take 100\.00 kB .*logits and mom.*refine\.stage: module"),
        ({"host": None, "disk": 1e4}, r"must lie in files, but .* has 10\.00 kB free; let memory\.disk_dir"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused(folder: Path, machine: dict, message: str):
    config = config_of(folder, "experts", folder / "text.txt")
    if machine.get("host", 0) is None:
        machine = machine | {"host": estimate_of(config).working.fixed_host}
    with pytest.raises(UserError, match=message):
        check_fit(estimate_of(config, replace(MACHINE, **machine)), folder)


def test_a_run_that_cannot_fit_does_not_start(folder: Path, text: Path, tmp_path: Path):
    config = config_of(folder, "dense", text, memory__host_gb=0.01)
    with pytest.raises(UserError, match=r"Python and its libraries .*may|may take 10\.00 MB \(memory\.host_gb\)"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_containers_limit_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limit, used, stat = (tmp_path / name for name in ("limit", "used", "stat"))
    monkeypatch.setattr(hardware, "CGROUPS", [tuple(map(str, (limit, used, stat)))])
    free = available_bytes()
    limit.write_text("max")
    used.write_text("1000")
    assert available_bytes() == pytest.approx(free, rel=0.2)
    limit.write_text("5000")
    stat.write_text("anon 3\ninactive_file 300\n")
    assert available_bytes() == 4300


# Published models and recipes


@pytest.fixture(scope="module")
def flagship() -> Skeleton:
    skeleton = skeleton_of("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", MOE)
    return skeleton


def test_the_reference_budget_fits_an_h200(flagship: Skeleton):
    """4096 sequences of 4096 tokens, 640 steps of 64; hidden states go where there is room."""
    settings = ["calib.windows=4112", "calib.length=4096", "refine.steps=640", "refine.windows=64", "refine.checks=1"]
    config = load_config(ROOT / "configs" / "qwen36_2bit.yaml", settings)
    h200 = Hardware.named("h200", ROOT)
    found = estimated(config, flagship, None, replace(h200, host=400 * GB, disk=1000 * GB))
    assert found.config.calib.batch == 16
    assert 40 * GB < found.working.fixed_device < 100 * GB
    assert found.working.peak(found.hardware, "device") <= h200.accelerator
    check_fit(found, ROOT)
    state = next(item for held in found.working.moments.values() for item in held if item.name == "logits and momentum")
    assert state.bytes == 805_306_368 * 4 * (4 + 2)  # of each expert weight four logits, and momentum in bfloat16
    seconds = found.seconds()["layer"]
    assert 44e12 * 640 / 989e12 < seconds["refine"] < 600  # the products at the data sheet's peak; ten minutes
    found.hardware = Hardware.named("rtx-4090", ROOT)
    with pytest.raises(UserError, match=r"logits and momentum 19\.33 GB.*refine\.logits: bfloat16"):
        check_fit(found, ROOT)


def test_a_search_for_bits_is_counted_as_it_walks(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    rules = [{"role": ["attention", "mlp"], "bits": "sensitivity", "group_size": 32}]
    settings = {"plan__rules": rules, "plan__target_bpw": 5.0, "plan__sensitivity": {"windows": 3, "length": 32}}
    config = config_of(folder, "dense", text, **settings)
    config = config.model_copy(update={"run": str(folder / "search" / "run")})
    estimate = estimate_of(config, replace(MACHINE, speed=GPUS["h200"].speed))
    search = Search(estimate.shapes, Pace(GPUS["h200"].speed))
    runs, run_layer = [], Skeleton.run_layer
    monkeypatch.setattr(Skeleton, "run_layer", lambda *args: runs.append(args[2].shape[0]) or run_layer(*args))
    plan_of(config, opened(config, CPU), progress=lambda done, layers: None)
    layers = estimate.shapes.skeleton.num_layers
    assert runs == [3] * (search.passes + layers)  # with a sample of each layer, of what is read by what
    assert 0 < search.seconds() == estimate.seconds()["run"]["plan"]
    assert (
        "plan"
        not in estimate_of(config_of(folder, "dense", text), replace(MACHINE, speed=GPUS["h200"].speed)).seconds()[
            "run"
        ]
    )


def test_micro_batches_are_as_large_as_an_accelerator_holds(folder: Path):
    config = config_of(
        folder, "dense", calib__batch="auto", calib__windows=256, calib__length=128, calib__validation=16
    )
    skeleton = opened(config, CPU)
    batches = lambda nbytes: estimated(config, skeleton, None, replace(MACHINE, accelerator=nbytes)).config.calib.batch  # noqa: E731
    needed = {}
    for windows in (1, 2, 4, 8, 16, 32):
        fixed = config.model_copy(update={"calib": config.calib.model_copy(update={"batch": windows})})
        needed[windows] = estimated(fixed, skeleton, None, replace(MACHINE, accelerator=GB)).working.fixed_device
    assert sorted(needed.values()) == list(needed.values())
    assert len(set(needed.values())) > 3
    for nbytes in needed.values():
        assert batches(nbytes) == max(windows for windows in needed if needed[windows] <= nbytes)
    assert batches(100 * GB) == 32  # windows of a lane
    assert batches(needed[1] / 2) == 1  # which is refused
    assert batches(None) == micro_batch(config, skeleton, folder) == 8
    long = config.model_copy(update={"calib": config.calib.model_copy(update={"length": 1 << 14})})
    assert estimated(long, skeleton, None, replace(MACHINE, accelerator=1e15)).config.calib.batch == 4


def test_unknown_devices():
    with pytest.raises(UserError, match="unknown device 'h2000'; known are h200, h100"):
        Hardware.named("h2000", ROOT)


def test_speed_is_measured():
    speed = measure(CPU, torch.float32, 64)
    assert all(value > 0 for name, value in vars(speed).items() if name != "ahead")
    half = replace(speed, exact=speed.exact / 2)
    assert half.seconds(Work(exact=1e9)) == pytest.approx(2 * speed.seconds(Work(exact=1e9)))


def test_windows_of_large_codebooks_are_counted():
    assert logits_per_weight(Codebook.integer(3, 32)) == 8
    assert logits_per_weight(Codebook.integer(4, 32)) == 5


def test_the_command_prints_tables(folder: Path, text: Path):
    source = source_of(folder, "dense")
    path = folder / "recipe.yaml"
    path.write_text(config_of(folder, "dense", text).to_yaml())
    for options in ([], ["--device", "h200", "--processes", "2"]):
        done = CliRunner().invoke(app, ["estimate", str(path), *options])
        assert done.exit_code == 0, done.output
        assert all(word in done.output for word in ("refine", "hidden states", "in all, host", "disk: run"))
    assert source.exists()
