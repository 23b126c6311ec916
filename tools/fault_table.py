"""Does each fault to a real job of two ranks, and writes what came of it into docs/faults.md.

    python tools/fault_table.py [NAME ...]           print the table, or some of its rows
    python tools/fault_table.py --write              put it into docs/faults.md

Jobs are started as a user starts them, `megabagel train ... --nproc 2`, so each takes the seconds of its imports. The
faults of disks mount small file systems, which takes the rights to do so.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.small_run import CONFIG, SETTINGS, write_data  # noqa: E402

DOCUMENT = ROOT / "docs" / "faults.md"
MARKERS = ("<!-- fault-table -->\n", "<!-- /fault-table -->")
LIMITS = ("run.heartbeat_timeout=5", "run.timeout=5", "run.start_timeout=5")
"""Short, so that the table is soon written; the defaults are 60, 600 and 300 seconds."""
STEPS = ("checkpoint.every=2", "train.steps=100000")
PATIENCE = 180.0

Act = Callable[["Scene"], None]


@dataclass
class Scene:
    """A job, its folder, and when the fault came."""

    folder: Path
    words: list[str] = field(default_factory=list)
    process: "subprocess.Popen[str] | None" = None
    began: float = 0.0
    since: str = "start"

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def start(self, *words: str, fault: str | None = None, **env: str) -> None:
        """Start the job with these settings; `fault` is planted by faulty_rank.py. RANK in `env`: one rank alone."""
        train = [
            "train",
            str(CONFIG),
            *SETTINGS,
            *LIMITS,
            *STEPS,
            f"run.dir={self.run}",
            f"data.root={self.folder.parent}/data",
        ]
        train += [*words]
        if fault:
            rank = [sys.executable, "-m", "tools.faulty_rank", fault, *train]
            launch = f"import sys; from megabagel.runtime.launch import spawn; sys.exit(spawn({rank!r}, 2))"
            command = [sys.executable, "-c", launch]
        else:
            command = [sys.executable, "-m", "megabagel", *train, *([] if env else ["--nproc", "2"])]
        self.began = time.monotonic()
        with (self.folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.DEVNULL,
                stderr=errors, text=True,
            )  # fmt: skip

    def until_step(self, count: int) -> None:
        """Wait until so many steps are on record."""
        path, end = self.run / "metrics.jsonl", time.monotonic() + PATIENCE
        while not (path.is_file() and path.read_bytes().count(b"\n") >= count):
            assert time.monotonic() < end and self.process and self.process.poll() is None, self.errors
            time.sleep(0.01)

    def ranks(self) -> dict[int, int]:
        """Process of every rank that runs."""
        assert self.process
        found = {}
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            rank = re.search(r"\0RANK=(\d+)", "\0" + Path(f"/proc/{child}/environ").read_text())
            assert rank
            found[int(rank[1])] = int(child)
        return found

    def hurt(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or the launcher; the clock starts here."""
        self.until_step(3)
        time.sleep(3)  # a job that has been running for a while
        assert self.process
        pid = self.process.pid if rank is None else self.ranks()[rank]
        self.began, self.since = time.monotonic(), "signal"
        os.kill(pid, number)

    def finish(self, *words: str) -> None:
        """A short run that ends well, to have something to damage."""
        self.start("train.steps=4", *words)
        assert self.process and self.process.wait(PATIENCE) == 0, self.errors

    def files(self, step: int) -> list[Path]:
        """Tensor files of a checkpoint."""
        return sorted((self.run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))

    @property
    def errors(self) -> str:
        """What the job said on stderr."""
        return (self.folder / "stderr").read_text()


def planted(fault: str) -> Act:
    """A fault in rank 1, after its second step."""

    def act(scene: Scene) -> None:
        scene.start(fault=fault)
        scene.until_step(2)
        scene.began, scene.since = time.monotonic(), "last finished step"

    return act


def signalled(number: int, rank: int | None = None) -> Act:
    """A signal after the third step."""

    def act(scene: Scene) -> None:
        scene.start()
        scene.hurt(number, rank)

    return act


def configured(*words: str) -> Act:
    """A fault that settings bring about."""
    return lambda scene: scene.start(*words)


def absent(scene: Scene) -> None:
    """Rank 1 of 2 is never started."""
    scene.start(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29631")


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(scene: Scene) -> None:
    """The disk has room for three checkpoints, and something else takes it after the first."""
    scene.start("checkpoint.every=4", "checkpoint.keep=0")
    while not (scene.run / "checkpoints/latest").is_file():
        time.sleep(0.01)
    state = os.statvfs(scene.run)
    (scene.run / "filler").write_bytes(bytes(state.f_bavail * state.f_frsize - 300_000))
    scene.began, scene.since = time.monotonic(), "disk full"


def read_only(scene: Scene) -> None:
    """The folder of the run cannot be written."""
    subprocess.run(["mount", "-o", "remount,ro", str(scene.run)], check=True)
    scene.start()


def truncate(scene: Scene) -> None:
    """Half of a tensor file of the newest checkpoint is gone."""
    scene.finish()
    path = scene.files(4)[0]
    os.truncate(path, path.stat().st_size // 2)
    scene.start("train.steps=5")


def flip(*steps: int) -> Act:
    """One bit of a tensor file of these checkpoints is another."""

    def act(scene: Scene) -> None:
        scene.finish()
        for step in steps:
            path = scene.files(step)[1]
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
        scene.start("train.steps=5")

    return act


def foreign(scene: Scene) -> None:
    """The newest checkpoint is of another model."""
    scene.finish()
    scene.start("model.ffn=64", "train.steps=5")


FAULTS: dict[str, tuple[str, Act]] = {
    "SIGTERM": ("to the launcher", signalled(signal.SIGTERM)),
    "SIGUSR1": ("to rank 1 alone", signalled(signal.SIGUSR1, 1)),
    "NaN loss": ("`train.lr=1e30`", configured("train.lr=1e30", "train.warmup=0")),
    "loss spike": (
        "`train.on_spike=stop`, any rise is one",
        configured("train.on_spike=stop", "train.spike_window=2", "train.spike_sigma=0.01", "train.spike_warmup=0"),
    ),
    "killed rank": ("SIGKILL to rank 1", signalled(signal.SIGKILL, 1)),
    "killed rank 0": ("SIGKILL to rank 0, which holds the store", signalled(signal.SIGKILL, 0)),
    "stopped rank": ("SIGSTOP to rank 1", signalled(signal.SIGSTOP, 1)),
    "stopped rank 0": ("SIGSTOP to rank 0, which holds the store", signalled(signal.SIGSTOP, 0)),
    "hung rank": ("rank 1 never gets its batch", planted("hang_in_data")),
    "hung collective": ("rank 1 receives where rank 0 reduces", planted("wrong_collective")),
    "failed rank": ("rank 1 raises an error", planted("bug")),
    "absent rank": ("rank 1 is never started", absent),
    "full disk": ("a file system of 6 MB is filled", full_disk),
    "read-only folder": ("remounted read-only", read_only),
    "truncated shard": ("half of a file of the newest checkpoint", truncate),
    "checksum mismatch": ("a bit flipped in the newest checkpoint", flip(4)),
    "no whole checkpoint": ("a bit flipped in each checkpoint", flip(2, 4)),
    "foreign checkpoint": ("`model.ffn=64` on a run with 32", foreign),
}
DISKS = {"full disk": "size=6000k", "read-only folder": "size=100k"}


def row(name: str, folder: Path) -> str:
    """Do one fault; its row of the table."""
    injected, act = FAULTS[name]
    scene = Scene(folder / re.sub(r"\W", "-", name))
    scene.folder.mkdir()
    if name in DISKS:
        with small_disk(scene.run, DISKS[name]):
            code, seconds = play(scene, act)
    else:
        code, seconds = play(scene, act)
    said = message(scene)
    print(f"{name}: {code}, {seconds:.1f} s\n{said or scene.errors[-1500:]}\n", file=sys.stderr)
    gone = f"{seconds:.1f} after {scene.since}" if code else "goes on"
    return f"| {name} | {injected} | {said} | {code} | {gone} |"


def play(scene: Scene, act: Act) -> tuple[int, float]:
    """Exit code of the job, and seconds until every process of it was gone."""
    act(scene)
    assert scene.process
    end = time.monotonic() + PATIENCE
    while scene.process.poll() is None and time.monotonic() < end:  # the launcher ends after its ranks
        if scene.since == "start" and re.search(r"megabagel: (error|stopped)", scene.errors):
            scene.began, scene.since = time.monotonic(), "message"
        time.sleep(0.01)
    return scene.process.wait(0), time.monotonic() - scene.began


def message(scene: Scene) -> str:
    """What the user reads, without what differs from run to run."""
    told = re.compile(r"megabagel: |not resuming from|resumed from")
    lines = [line for line in scene.errors.splitlines() if told.search(line)]
    lines = [re.sub(r"^(\[rank \d\] )*(megabagel: (error: |stopped: )?)?", "", line) for line in lines]
    text = " / ".join(dict.fromkeys(lines))  # what several ranks say, once
    text = text.replace(str(scene.run), "RUN").replace(str(scene.folder.parent), "FOLDER")
    text = re.sub(r"\(\S+, process \d+\)", "(host, process N)", text)
    text = re.sub(r"on \S+, process \d+,", "on host, process N,", text)
    return text.replace("|", "\\|")


def main() -> None:
    """Do the faults and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*FAULTS, []], help="faults (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/faults.md")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        write_data(folder / "data")
        rows = [row(name, folder) for name in args.names or FAULTS]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    head = ["| fault | injected by | message | exit code | gone in s |", "| --- | --- | --- | --- | --- |"]
    table = "\n".join([*head, *rows])
    print(table)
    if args.write:
        before, _, rest = DOCUMENT.read_text().partition(MARKERS[0])
        DOCUMENT.write_text(f"{before}{MARKERS[0]}{table}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")


if __name__ == "__main__":
    main()
