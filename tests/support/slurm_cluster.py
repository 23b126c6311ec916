"""A throw-away Slurm for tests, and what they ask of it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
MISSING = "no Slurm here: as root, tools/local_slurm.sh install"
NO_GPUS = ("--gpus-per-node=0", "--cpus-per-task=1")
"""The example scripts ask for GPUs; here are none."""
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", *NO_GPUS)
PATIENCE_S = 300
"""Longer than anything takes on a busy machine."""
UNDER_WAY = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")


class Cluster:
    """Two nodes of four processors on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "megabagel"
        self.program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megabagel "$@"\n')
        self.program.chmod(0o755)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MEGABAGEL": str(self.program),
            "MASTER_ADDR": "127.0.0.1",  # the names of the nodes resolve nowhere
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }

    def run(self, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's folder; what it printed on both channels is in `stdout`."""
        command = [str(word) for word in words]
        pipe, also = subprocess.PIPE, subprocess.STDOUT
        return subprocess.run(
            command, env=self.env | env, cwd=self.folder, stdout=pipe, stderr=also, text=True, timeout=PATIENCE_S
        )

    def call(self, *words: str | Path, **env: str) -> str:
        """Run a command that succeeds, one of Slurm's or a script that calls them; returns what it printed."""
        done = self.run(*words, **env)
        assert done.returncode == 0, f"{words}: code {done.returncode}: {done.stdout}"
        return done.stdout

    def submit(self, *words: str | Path, **env: str) -> str:
        """Submit a job, options first; returns its number."""
        return self.call("sbatch", "--parsable", *words, **env).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[-1]

    def wait(self, job: str, until: Callable[[], bool]) -> None:
        """Wait for something that a job does."""
        end = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < end, f"job {job} is {self.state(job)} after {PATIENCE_S} s\n{self.log(job)}"
            time.sleep(0.1)

    def ended(self, job: str) -> str:
        """The state in which a job ends."""

        def over() -> bool:
            self.hurry(job)
            return self.state(job) not in UNDER_WAY

        self.wait(job, over)
        return self.state(job)

    def hurry(self, job: str) -> None:
        """Start a requeued job now: it need not wait out Slurm's two minutes.

        But not in the second in which it ended: its nodes would refuse it, as its credential was revoked then.
        """
        if "Reason=BeginTime" in self.call("scontrol", "show", "job", job):
            time.sleep(2)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # it may have started just now

    def log(self, job: str) -> str:
        """What the job's script and its ranks said."""
        number = job.replace("_", "-")
        files = [path for end in (".log", "/*") for path in sorted(self.folder.glob(f"logs/*-{number}{end}"))]
        return "\n".join(f"== {file}\n{file.read_text()}" for file in files)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, taken down at the end with its jobs; skips the test where Slurm is not installed."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip(MISSING)
    tool = ROOT / "tools" / "local_slurm.sh"
    (folder / "logs").mkdir()
    try:
        subprocess.run([tool, "up", folder, "2", "4"], check=True, timeout=60)
        yield Cluster(folder)
    finally:
        subprocess.run([tool, "down", folder], check=True, timeout=120)
