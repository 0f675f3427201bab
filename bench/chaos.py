"""Chaos: a run is killed, stopped, damaged and starved of disk at random, resumed, and must end with the same bytes.

    python bench/chaos.py configs/tiny_moe_cpu.yaml --set model.name=DIR --runs 30 --processes 2 --out /tmp/chaos

First unbroken runs of 1, 2 and 4 processes, which must agree; then `--runs` runs in which something happens
up to three times, at a random moment: `STRIKES` to the processes, and `DAMAGES` to the files of the run before it
is resumed, with another number of processes. A run passes if it ends, if its layers and its export are those
of the unbroken one byte for byte, if no strike cost more than the one layer at work, and if what was finished
before it stayed as it was. What the program refuses to continue from is counted, put back, and resumed again.

Processes are started by torchrun, or (`--launcher fork`, many times quicker) as copies of one that has imported
everything. Draws come from `--seed`; what they meet depends on the machine's pace. Writes `chaos.md` and
`chaos.json`; the exit code is 1 if any run failed, whose folder is kept. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import typer

from gsq.files import free_bytes
from gsq.run import EXPORT, JOURNAL, LAYERS, TOKENS
from gsq.tracking import METRICS, read_metrics

PROGRAM = Path(__file__).resolve().parent.parent / "gsq" / "train.py"
POLL = 0.01  # seconds
PATIENCE = 300  # seconds until processes that should end are given up
ORPHANS = 60  # and those whose launcher is gone
EARLY = 0.1  # share of strikes that come before the work begins
LATE = 1.1  # strikes come up to here, where 1 is the end of the export, as far as it can be foretold
DAMAGED = 0.3  # share of resumes before which a file is damaged
DISK = 1 << 30  # bytes of the small disk
STARTUP, FULL = "start-up", "fill the disk"
STUCK = -signal.SIGALRM  # in place of an exit code: had to be killed
ERROR = "error: "  # how a message of the program begins
FORKS = multiprocessing.get_context("forkserver")


# Starting processes


class Launch(Protocol):
    """Processes of one run, just started."""

    launcher: int | None  # the process that started them, if it is not this one

    def ranks(self) -> list[int]:
        """Process ids of those that work, as far as they have started."""

    def code(self) -> int | None:
        """Exit code of all; None while one is at work."""


class Torchrun:
    """By `torchrun`; a single process plainly."""

    def __init__(self, processes: int, arguments: Sequence[str], log: Path):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), str(PROGRAM), *arguments]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with open(log, "ab") as output:
            self._child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.launcher = self._child.pid if processes > 1 else None

    def ranks(self) -> list[int]:
        """Children of the launcher."""
        if self.launcher is None:
            return [self._child.pid]
        with suppress(OSError):
            return sorted(map(int, Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()))
        return []

    def code(self) -> int | None:
        """That of the launcher."""
        return self._child.poll()


class Forked:
    """As copies of a process that has imported everything; nobody ends the others when one dies."""

    launcher = None

    def __init__(self, processes: int, arguments: Sequence[str], log: Path):
        FORKS.set_forkserver_preload(["gsq.cli", "gsq.train"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self._children = [FORKS.Process(target=forked, args=(list(arguments), rank, log)) for rank in ranks]
        for child in self._children:
            child.start()

    def ranks(self) -> list[int]:
        """All of them."""
        return [child.pid for child in self._children]

    def code(self) -> int | None:
        """The first that is not 0, if there is one."""
        codes = [child.exitcode for child in self._children]
        return None if None in codes else next(filter(None, codes), 0)


def forked(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """What a copy does: the program, with the environment that a launcher would give it."""
    import torch

    from gsq.cli import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    main(["quantize", *arguments])


LAUNCHERS: dict[str, type[Torchrun] | type[Forked]] = {"torchrun": Torchrun, "fork": Forked}


# What happens to processes and files


class Disk:
    """The file system of a folder, a small one in memory where this user may mount that."""

    def __init__(self, folder: Path, mount: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.mounted = mount and (os.path.ismount(folder) or self._mount(f"size={DISK}"))

    def fill(self, ranks: Iterable[int], slack: int) -> None:
        """Leave `slack` bytes; where it is not ours to mount, let no file grow beyond that instead."""
        if self.mounted:
            used = DISK - free_bytes(self.folder)
            self._mount(f"remount,size={used + slack}")
            return
        for rank in ranks:
            with suppress(ProcessLookupError):
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (slack, resource.RLIM_INFINITY))

    def free(self) -> None:
        """Make room again."""
        if self.mounted:
            self._mount(f"remount,size={DISK}")

    def close(self) -> None:
        """Unmount it, with all that is there."""
        if self.mounted:
            subprocess.run(["umount", self.folder], check=True)

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "gsq-chaos", str(self.folder)]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


@dataclass(frozen=True)
class Strike:
    """Something that happens once: `at` this share of the work that is left; below 0, of the time before it begins."""

    kind: str
    at: float
    luck: float  # from 0 to 1: which rank, how much disk


def send(number: int, ranks: Iterable[int]) -> None:
    """A signal to processes, of which some may be gone."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number)


def one(launch: Launch, luck: float) -> list[int]:
    """A rank, by luck."""
    ranks = launch.ranks()
    return ranks[int(luck * len(ranks)) :][:1]


def everyone(launch: Launch) -> list[int]:
    """The launcher, if there is one, then all ranks."""
    return [pid for pid in (launch.launcher, *launch.ranks()) if pid is not None]


STRIKES: dict[str, tuple[int, Callable[[Launch, float, Disk], None]]] = {  # how often, and what
    "kill a rank": (8, lambda launch, luck, disk: send(signal.SIGKILL, one(launch, luck))),
    "kill all": (2, lambda launch, luck, disk: send(signal.SIGKILL, everyone(launch))),
    "kill the launcher": (2, lambda launch, luck, disk: send(signal.SIGKILL, everyone(launch)[:1])),
    "stop a rank": (1, lambda launch, luck, disk: send(signal.SIGTERM, one(launch, luck))),
    "stop all": (2, lambda launch, luck, disk: send(signal.SIGTERM, launch.ranks())),
    FULL: (2, lambda launch, luck, disk: disk.fill(launch.ranks(), int(2 ** (9 + 8 * luck)))),
}


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file off somewhere."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def remove(path: Path, rng: random.Random) -> None:
    """Delete a file."""
    path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path, random.Random], None], str]] = {  # what, and files of the run to choose from
    "a layer is cut off": (truncate, f"{LAYERS}/*.safetensors"),
    "a bit of a layer flips": (flip, f"{LAYERS}/*.safetensors"),
    "a layer is gone": (remove, f"{LAYERS}/*.safetensors"),
    "the journal is cut off": (truncate, JOURNAL),
    "the metrics are cut off": (truncate, METRICS),
    "the tokens are cut off": (truncate, TOKENS),
    "a bit of the tokens flips": (flip, TOKENS),
    "the plan is cut off": (truncate, "plan.json"),
    "a file of the export is cut off": (truncate, f"{EXPORT}/*"),
    "a bit of the export flips": (flip, f"{EXPORT}/*.safetensors"),
}


# One run


@dataclass
class Episode:
    """One start of a run's processes, what was to happen, and what came of it."""

    processes: int
    strike: Strike | None = None
    damage: str | None = None  # before it
    damaged: str | None = None  # the file
    answer: str | None = None  # to the damage
    phase: str | None = None  # in which the strike came; None: it came too late
    orphans: bool = False  # whether processes stayed when their launcher was gone
    lost: int = 0  # layers at work at its end, which the next start does again
    code: int | None = None
    seconds: float = 0.0


@dataclass
class Trial:
    """A run with all its starts, and what is wrong with it."""

    name: str
    episodes: list[Episode]
    wrong: list[str] = field(default_factory=list)


@dataclass
class Expected:
    """What unbroken runs made: a digest of each file; seconds before and at work, until the export, by processes."""

    files: dict[str, str]
    layers: int
    seconds: dict[int, tuple[float, float]]


class Arena:
    """Where trials take place: the recipe, the launcher and the disk that all of them share."""

    def __init__(self, arguments: Sequence[str], launcher: str, out: Path, mount: bool):
        self.arguments, self.launcher, self.out = list(arguments), LAUNCHERS[launcher], out
        self.disk = Disk(out / "disk", mount)

    def start(self, run: Path, processes: int) -> Launch:
        """Begin or continue a run."""
        return self.launcher(processes, [*self.arguments, "--out", str(run), "--resume"], self.log(run))

    def log(self, run: Path) -> Path:
        """What a run's processes say, all starts in one file."""
        return self.out / f"{run.name}.log"

    def unbroken(self, counts: Iterable[int]) -> Expected:
        """Runs of these numbers of processes, to which nothing happens; raises `SystemExit` if they disagree."""
        found, seconds = {}, {}
        for processes in counts:
            run = self.disk.folder / f"unbroken-{processes}"
            shutil.rmtree(run, ignore_errors=True)
            start = time.perf_counter()
            launch = self.start(run, processes)
            wait_for(lambda run=run, launch=launch: starts(run) or launch.code() is not None)
            begun = time.perf_counter()
            wait_for(lambda run=run, launch=launch: (run / EXPORT).exists() or launch.code() is not None)
            exported = time.perf_counter()
            if code := end(launch):
                sys.exit(f"an unbroken run of {processes} processes ended with {code}; see {self.log(run)}")
            seconds[processes] = (begun - start, exported - begun)
            found[processes] = digests(run)
            layers = len(journal(run))
            shutil.rmtree(run)
        first, *others = found.values()
        if any(other != first for other in others):
            sys.exit(f"unbroken runs of {', '.join(map(str, found))} processes differ")
        return Expected(first, layers, seconds)

    def trial(self, name: str, episodes: list[Episode], expected: Expected, rng: random.Random) -> Trial:
        """A run through all its episodes, the last of which nothing strikes; kept if anything is wrong."""
        trial, run = Trial(name, episodes), self.disk.folder / name
        shutil.rmtree(run, ignore_errors=True)
        for episode in episodes:
            self.play(trial, episode, run, expected, rng)
        trial.wrong += differences(digests(run), expected.files)
        if trial.wrong:
            with suppress(OSError):
                shutil.copytree(run, self.out / "failed" / name, dirs_exist_ok=True)
        shutil.rmtree(run, ignore_errors=True)
        return trial

    def play(self, trial: Trial, episode: Episode, run: Path, expected: Expected, rng: random.Random) -> None:
        """One episode: damage, start, strike, end; then what stayed."""
        began, before, said = time.perf_counter(), journal(run), self.log(run).stat().st_size if run.exists() else 0
        undamaged = damage(run, episode, rng)
        kept = untouched(before, episode.damaged) if episode.damaged != JOURNAL else journal(run)
        begun = starts(run)
        launch = self.start(run, episode.processes)
        if episode.strike:
            self.strike(launch, episode, run, expected, begun)
        episode.code = end(launch)
        errors = [text for text in self.log(run).read_text(errors="replace")[said:].splitlines() if ERROR in text]
        if episode.code == STUCK:
            trial.wrong.append(f"processes did not end after {episode.strike}")
        elif episode.damaged:
            self.answer(trial, episode, run, undamaged, len(before) - len(kept), errors)
        elif episode.strike is None and episode.code:
            trial.wrong.append(f"resumed for good, it ended with {episode.code}")
        elif full(episode) and episode.code and self.disk.mounted and not errors:
            trial.wrong.append(f"a full disk in {episode.phase} ended it with {episode.code} and no message")
        after = journal(run)
        if after[: len(kept)] != kept:
            trial.wrong.append(f"finished layers were done again after {episode.damage or 'no damage'}")
        if episode.phase not in (None, STARTUP):
            episode.lost = len(at_work(run, len(after)))
        if episode.lost > 1:
            trial.wrong.append(f"{episode.lost} layers were at work at once")
        episode.seconds = time.perf_counter() - began

    def strike(self, launch: Launch, episode: Episode, run: Path, expected: Expected, before: int) -> None:
        """Wait for the moment, then strike, unless the processes have ended; work had begun `before` times."""
        strike = episode.strike
        startup, work = expected.seconds[episode.processes]
        over = lambda: launch.code() is not None  # noqa: E731
        if strike.at < 0:
            wait_for(over, -strike.at * startup)
        else:
            wait_for(lambda: starts(run) > before or over())
            left = (expected.layers - len(journal(run)) + 1) / (expected.layers + 1)  # the export is like a layer
            wait_for(over, strike.at * left * work)
        if over():
            return
        episode.phase = phase(run, expected.layers, begun=starts(run) > before)
        ranks = launch.ranks()
        STRIKES[strike.kind][1](launch, strike.luck, self.disk)
        end(launch)
        episode.orphans = bury(ranks)
        self.disk.free()

    def answer(
        self, trial: Trial, episode: Episode, run: Path, undamaged: bytes, fewer: int, errors: list[str]
    ) -> None:
        """What the program made of a damage. If it refused, undo that, and continue without a strike."""
        if episode.phase or not episode.code:
            episode.answer = "layers done again" if fewer else "went on"
            return
        episode.answer = f"refused: {errors[-1].partition(ERROR)[2]}" if errors else "a traceback"
        if not errors:
            trial.wrong.append(f"{episode.damage}: it ended with {episode.code} and a traceback")
        (run / episode.damaged).write_bytes(undamaged)
        if code := end(self.start(run, episode.processes)):
            trial.wrong.append(f"{episode.damage}: put back, it ended with {code}")


def drawn(rng: random.Random, counts: Sequence[int], first: int) -> list[Episode]:
    """What is to happen to a run: one to three strikes, then an episode without."""
    weights = [often for often, _ in STRIKES.values()]
    episodes = [Episode(first)]
    for _ in range(rng.randint(1, 3)):
        [kind] = rng.choices(list(STRIKES), weights)
        at = -rng.random() if rng.random() < EARLY else LATE * rng.random()
        episodes[-1].strike = Strike(kind, at, rng.random())
        damage = rng.choice(list(DAMAGES)) if rng.random() < DAMAGED else None
        episodes.append(Episode(rng.choice(counts), damage=damage))
    return episodes


def damage(run: Path, episode: Episode, rng: random.Random) -> bytes:
    """Do what the episode says to a file of the run, if there is one; its bytes before."""
    if episode.damage is None:
        return b""
    what, pattern = DAMAGES[episode.damage]
    files = sorted(path for path in run.glob(pattern) if path.stat().st_size)
    if not files:
        return b""
    path = rng.choice(files)
    before = path.read_bytes()
    what(path, rng)
    episode.damaged = str(path.relative_to(run))
    return before


# What a run folder says


def untouched(lines: list[dict], damaged: str | None) -> list[dict]:
    """Lines of the journal before that of a damaged layer, or all of them."""
    files = [
        f"{LAYERS}/{'outside' if row['layer'] is None else format(row['layer'], '05d')}.safetensors" for row in lines
    ]
    return lines[: files.index(damaged)] if damaged in files else lines


def full(episode: Episode) -> bool:
    """Whether the disk was filled while an episode was at work."""
    return episode.phase is not None and episode.strike.kind == FULL


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of a run's layers and export."""
    files = sorted(path for folder in (LAYERS, EXPORT) for path in (run / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """What differs, file by file."""
    return [
        f"{name} {'differs' if name in found and name in expected else 'is missing' if name in expected else 'is new'}"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]


def journal(run: Path) -> list[dict]:
    """Whole lines of the journal."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        lines = (run / JOURNAL).read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


def starts(run: Path) -> int:
    """How often the run's work has begun. Asked so often that lines are not parsed."""
    with suppress(FileNotFoundError):
        return (run / METRICS).read_text(errors="replace").count('"kind": "start"')
    return 0


def at_work(run: Path, finished: int) -> set[int]:
    """Layers behind the finished ones that something was measured of."""
    return {event["layer"] for event in read_metrics(run) if event.get("layer", -1) >= finished}


BEHIND = {  # phase by the last event
    "start": "reading", "plan": "reading", "curve": "reading", "layer": "reading", "coverage": "init",
    "step": "refinement", "stage": "refinement", "target": "end of a layer", "eval": "report", "done": "report",
}  # fmt: skip


def phase(run: Path, layers: int, begun: bool) -> str:
    """What the run is doing, judged by the last thing that it wrote."""
    if not begun:
        return STARTUP
    events = read_metrics(run)
    last = BEHIND.get(events[-1]["kind"], "another phase") if events else "reading"
    if last != "report" and len(journal(run)) >= layers:
        return "export"
    return last


# Waiting


def wait_for(condition: Callable[[], object], seconds: float | None = None) -> bool:
    """Until something holds, or for so long (`PATIENCE` by default); whether it holds."""
    deadline = time.perf_counter() + (PATIENCE if seconds is None else seconds)
    while not condition():
        if time.perf_counter() > deadline:
            return False
        time.sleep(POLL)
    return True


def end(launch: Launch) -> int:
    """Exit code of all processes, which are killed if they do not end."""
    if not wait_for(lambda: launch.code() is not None):
        send(signal.SIGKILL, everyone(launch))
        wait_for(lambda: launch.code() is not None)
        return STUCK
    return launch.code()


def bury(ranks: Sequence[int]) -> bool:
    """Wait for processes whose launcher has ended, then kill those that stay; whether there were any."""
    gone = lambda: not any(map(alive, ranks))  # noqa: E731
    if wait_for(gone, ORPHANS):
        return False
    send(signal.SIGKILL, filter(alive, ranks))
    wait_for(gone)
    return True


def alive(pid: int) -> bool:
    """Whether a process of this program is there and has not ended."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return status not in "ZX"
    return False


# All runs


def main(
    config: Annotated[Path, typer.Argument(help="recipe of a model that takes seconds")],
    out: Annotated[Path, typer.Option(help="folder for logs, tables and failed runs")],
    runs: Annotated[int, typer.Option(help="broken runs")] = 30,
    processes: Annotated[int, typer.Option(help="that a run begins with; resumed, it has 1, 2 or 4")] = 2,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    launcher: Annotated[str, typer.Option(help=", ".join(LAUNCHERS))] = "torchrun",
    tmpfs: Annotated[bool, typer.Option(help="run on a small disk in memory, if it can be mounted")] = True,
    overrides: Annotated[list[str], typer.Option("--set", help="change a setting of the config")] = [],  # noqa: B006
) -> None:
    """Break runs, compare them, write the tables; exit with 1 if one is not as it should be."""
    if launcher not in LAUNCHERS:
        raise typer.BadParameter(f"unknown launcher {launcher!r}; there are {', '.join(LAUNCHERS)}")
    out.mkdir(parents=True, exist_ok=True)
    settings = [argument for override in overrides for argument in ("--set", override)]
    arena = Arena([str(config.resolve()), *settings], launcher, out, tmpfs)
    try:
        counts = sorted({1, 2, 4, processes})
        expected = arena.unbroken(counts)
        trials = []
        for number in range(runs):
            rng = random.Random(f"{seed} {number}")
            trials.append(arena.trial(f"run-{number:03d}", drawn(rng, counts, processes), expected, rng))
            print(line(trials[-1]), flush=True)
            (out / "chaos.json").write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
            (out / "chaos.md").write_text(report(trials, expected))
    finally:
        arena.disk.close()
    print("\n" + report(trials, expected))
    sys.exit(any(trial.wrong for trial in trials))


def line(trial: Trial) -> str:
    """A trial in one line, for the console."""
    told = []
    for episode in trial.episodes:
        happened = f": {episode.strike.kind} in {episode.phase or 'vain'}" if episode.strike else ""
        damaged = f"{episode.damage} ({episode.answer}), " if episode.damaged else ""
        told.append(f"{damaged}{episode.processes}{happened}")
    return f"{trial.name}  {' | '.join(told)}  {'; '.join(trial.wrong) or 'same bytes'}"


def report(trials: Sequence[Trial], expected: Expected) -> str:
    """All of it as Markdown."""
    episodes = [episode for trial in trials for episode in trial.episodes]
    struck = [episode for episode in episodes if episode.phase]
    missed = sum(episode.strike is not None for episode in episodes) - len(struck)
    damaged = [episode for episode in episodes if episode.damaged]
    times = ", ".join(f"{count}: {a:.1f} + {b:.1f} s" for count, (a, b) in expected.seconds.items())
    heads = [
        f"{len(trials)} runs, {sum(not trial.wrong for trial in trials)} with the bytes of the unbroken ones "
        f"({len(expected.files)} files)",
        f"unbroken, start and work by number of processes: {times}",
        f"{len(struck)} strikes ({missed} more came after the end), which cost "
        f"{sum(episode.lost for episode in struck)} layers at work, at most "
        f"{max((episode.lost for episode in struck), default=0)} each",
        f"{sum(episode.orphans for episode in struck)} times, processes lived {ORPHANS} s longer than their launcher",
        *(f"**{trial.name}**: {'; '.join(trial.wrong)}" for trial in trials if trial.wrong),
    ]
    phases = list(dict.fromkeys([STARTUP, *BEHIND.values(), "export", *(e.phase for e in struck)]))
    counts = Counter((episode.strike.kind, episode.phase) for episode in struck)
    rows = [[kind, *(counts[kind, phase] or "" for phase in phases)] for kind in STRIKES]
    answers = Counter((e.damage, (e.answer or "").partition(":")[0]) for e in damaged)
    tables = [
        table(["strikes", *phases], rows),
        table(["damage", "answer", "times"], [[*key, count] for key, count in sorted(answers.items())]),
    ]
    return "\n".join([*(f"- {head}" for head in heads), "", "\n\n".join(tables), ""])


def table(heads: list[str], rows: Iterable[list]) -> str:
    """Rows as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
