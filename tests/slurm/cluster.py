"""A throw-away Slurm for tests, and what they ask of it."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
MISSING = "no Slurm here: as root, tools/local_slurm.sh install"
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
"""The example scripts ask for GPUs; here two nodes run a rank each."""


class Cluster:
    """Two nodes of four processors on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wrapper = folder / "megabagel"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megabagel "$@"\n')
        wrapper.chmod(0o755)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MEGABAGEL": str(wrapper),
            "MASTER_ADDR": "127.0.0.1",  # the names of the nodes resolve nowhere
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        }

    def call(self, *words: str | Path, timeout: float = 60, **env: str) -> str:
        """Run a command of Slurm's, or a script that calls them; returns what it printed."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.env | env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, **env: str) -> str:
        """Submit a job with the options of `SMALL`; returns its number."""
        return self.call("sbatch", "--parsable", *SMALL, *words, **env).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))[-1]

    def ended(self, job: str, seconds: float) -> str:
        """The state in which a job ends. A requeued one need not wait out Slurm's two minutes."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < end, f"job {job} is {state} after {seconds} s\n{self.log(job)}"
            if state == "PENDING" and "Reason=BeginTime" in self.call("scontrol", "show", "job", job):
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(0.2)
        return state

    def log(self, job: str) -> str:
        """What the job's script and its ranks said."""
        files = sorted(self.folder.glob(f"logs/*{job}*")) + sorted(self.folder.glob(f"logs/*{job}*/*"))
        return "\n".join(f"== {file}\n{file.read_text()}" for file in files if file.is_file())


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, taken down at the end; skips the test where Slurm is not installed."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip(MISSING)
    tool = ROOT / "tools" / "local_slurm.sh"
    subprocess.run([tool, "up", folder, "2", "4"], check=True, timeout=60)
    (folder / "logs").mkdir()
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([tool, "down", folder], check=True, timeout=60)
