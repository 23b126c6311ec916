"""Rows about the machine: devices and links, memory, disk, limits, and how this process was started."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from megabagel_kernels.attention.configs import why_unavailable_here

from megabagel.doctor.row import Row, absent, ok, wrong
from megabagel.errors import UserError
from megabagel.parallel.mesh import read_launch_env
from megabagel.runtime.gpu_environment import spoilers

GIB = 2**30
FEWEST_FILES = 4096
"""Open files: shards, worker pipes and sockets of a rank."""
SMALLEST_SHM = GIB
"""/dev/shm: worker processes hand their batches over in it, and NCCL its buffers."""


def devices() -> Iterator[Row]:
    """GPUs, their driver, NCCL, the links between them, and whether attention kernels are at hand for them."""
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else None
        if built and shutil.which("nvidia-smi"):
            yield wrong("cuda", f"{built}, but sees no GPU", "compare the driver's CUDA version (nvidia-smi) with it")
        else:
            yield absent("cuda", f"everything runs on the CPU, over gloo ({built or 'a CPU build of torch'})")
        return
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    about = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in names)
    yield ok("cuda", f"{torch.version.cuda}; {about}")
    if dist.is_nccl_available():
        yield ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield wrong("nccl", "this torch has none", "install a CUDA build of torch from its own index")
    yield _links(len(names))
    lacking = why_unavailable_here(torch.bfloat16, 128)
    cost = f"{lacking}: attention runs on FlexAttention" if lacking else ""
    yield absent("attention kernels", cost) if lacking else ok("attention kernels", "tables for this GPU and Triton")


def _links(gpus: int) -> Row:
    if gpus == 1:
        return ok("gpu links", "one GPU")
    try:
        told = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return wrong("gpu links", str(error), "nvidia-smi should run; its absence hides slow links")
    rows = [line.split() for line in told.splitlines() if line.startswith("GPU")]
    kinds = sorted({kind for row in rows for kind in row[1 : gpus + 1] if kind != "X" and not kind.startswith("GPU")})
    found = ", ".join(kinds) or "unknown"
    if any(kind.startswith("NV") for kind in kinds):
        return ok("gpu links", found)
    return absent("gpu links", f"no NVLink ({found}): keep parallel.tp at 1, tensor parallelism needs fast links")


def memory() -> Iterator[Row]:
    """Memory that this process may use, and shared memory."""
    whole = psutil.virtual_memory()
    limit = _cgroup_limit()
    allowed = min(whole.total, limit or whole.total)
    told = f"{allowed / GIB:.1f} GiB, {whole.available / GIB:.1f} GiB of the machine free"
    yield ok("memory", told + (" (limited by the job's cgroup)" if allowed < whole.total else ""))
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield absent("shared memory", "no /dev/shm: use data.workers=0")
        return
    size = shutil.disk_usage(shm).total
    if size < SMALLEST_SHM:
        fix = f"at least {SMALLEST_SHM / GIB:.0f} GiB: docker run --shm-size=8g, or mount a larger tmpfs"
        yield wrong("shared memory", f"{size / 2**20:.0f} MiB in /dev/shm", fix)
    else:
        yield ok("shared memory", f"{size / GIB:.1f} GiB in /dev/shm")


def _cgroup_limit(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may use, by its cgroup and all those around it; None without a limit.

    own: lines `number:controllers:path`, number 0 in version 2. A path that a container does not see is left out.
    """
    limits = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            with suppress(OSError):
                limits.append((top / folder / name).read_text().strip())
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def processors() -> Row:
    """Processors that this process may run on."""
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    told = f"{allowed} of {there}" if allowed < there else f"{there}"
    if allowed == 1 < there:
        fix = (
            "decoding needs processors; under Slurm give srun itself --cpus-per-task=N (since 22.05 it does not take "
            "sbatch's over), or --cpu-bind=none"
        )
        return wrong("processors", told, fix)
    return ok("processors", told)


def limits() -> Row:
    """Open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEWEST_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        return wrong(
            "open files", str(soft), f"at least {FEWEST_FILES}: ulimit -n {FEWEST_FILES} (at most {most} here)"
        )
    return ok("open files", str(soft))


def disk(folder: Path) -> Row:
    """The disk that a run below `folder` would be written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return wrong("disk", f"{there} cannot be written", "set run.dir to a folder of yours")
    return ok("disk", f"{free / GIB:.1f} GiB free in {there}")


def launch(env: Mapping[str, str]) -> Row:
    """How this process was started: by torchrun, srun or alone, and whether the variables agree."""
    try:
        rank, size, local_rank = read_launch_env()
    except UserError as error:
        return wrong("launch", "contradictory variables", str(error))
    who = "torchrun" if "RANK" in env else "srun" if size > 1 else "alone"
    return ok("launch", f"{who}: rank {rank} of {size}, local rank {local_rank}" if size > 1 else who)


def environment(env: Mapping[str, str]) -> Row:
    """Variables that cost speed on a GPU."""
    if found := spoilers(env):
        return wrong("environment", f"{len(found)} variables cost speed", "; ".join(found))
    return ok("environment", "no variable that costs speed")


def slurm(env: Mapping[str, str]) -> Row:
    """Slurm's commands, and the job that this process is in."""
    if "SLURM_JOB_ID" in env:
        nodes, name = env.get("SLURM_JOB_NUM_NODES", "?"), env.get("SLURM_JOB_NODELIST", "?")
        return ok("slurm", f"job {env['SLURM_JOB_ID']} on {nodes} nodes ({name})")
    if shutil.which("sbatch") is None:
        return absent("slurm", "no sbatch here: start ranks with --nproc or torchrun")
    return ok("slurm", shutil.which("sbatch") or "")


def machine(folder: Path) -> Iterator[Row]:
    """All rows of this file; `folder` is where a run would be written."""
    yield from devices()
    yield processors()
    yield from memory()
    yield disk(folder)
    yield limits()
    yield slurm(os.environ)
    yield launch(os.environ)
    if torch.cuda.is_available():
        yield environment(os.environ)
