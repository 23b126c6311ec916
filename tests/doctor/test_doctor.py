"""The doctor: what is there, what is absent and at what cost, what is wrong and how to mend it."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from megabagel import cli
from megabagel.doctor import machine, row, software
from megabagel.doctor.row import Row, absent, ok, wrong
from megabagel.runtime.launch_env import SRUN, TORCHRUN

HERE = Path(__file__).parents[2]


def put_package(folder: Path, name: str, init: str = "") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(init)


def test_exit_code() -> None:
    rows = [ok("a", "1"), absent("b", "slow")]
    assert row.exit_code(rows, []) == 0
    assert row.exit_code(rows, ["a"]) == 0
    assert row.exit_code(rows, ["b"]) == 1
    assert row.exit_code([*rows, wrong("c", "2", "mend it")], []) == 1


def test_json_has_every_field() -> None:
    rows = [ok("a", "1"), wrong("c", "2", "mend it")]
    assert [Row(**entry) for entry in json.loads(row.as_json(rows))] == rows


def test_table_shows_name_status_finding_and_advice() -> None:
    out = io.StringIO()
    row.show([ok("a", "1.2"), absent("b", "slow; get it"), wrong("c", "2", "mend it")], Console(file=out, width=60))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["a", "ok", "1.2"],
        ["b", "absent", "slow;", "get", "it"],
        ["c", "wrong", "2"],
        ["mend", "it"],
    ]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that packages are taken to have."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(software, "version", version)
    monkeypatch.setattr(software, "_pinned", lambda: ({"lamp": Requirement("lamp>=2,<3")}, {}))
    return versions


def test_package_that_is_needed_and_not_there(installed: dict[str, str]) -> None:
    assert software.package("lamp", "json") == wrong("lamp", "not installed", "pip install 'lamp<3,>=2'")


def test_package_that_is_optional_and_not_there(installed: dict[str, str]) -> None:
    assert software.package("lamp", "json", "dark") == absent("lamp", "dark; pip install 'lamp<3,>=2'")


def test_package_that_is_too_old(installed: dict[str, str]) -> None:
    installed["lamp"] = "1.9"
    found = software.package("lamp", "json", "dark")
    assert (found.status, found.found) == ("wrong", "1.9")
    assert "<3,>=2" in found.advice


def test_local_build_of_the_right_version(installed: dict[str, str]) -> None:
    installed["lamp"] = "2.13.0+cpu"
    assert software.package("lamp", "json") == ok("lamp", "2.13.0+cpu")


def test_package_that_does_not_load(installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed["lamp"] = "2.5"
    put_package(tmp_path, "lamp_of_test", "raise OSError('no oil\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    found = software.package("lamp", "lamp_of_test")
    assert (found.status, found.found) == ("wrong", "2.5 does not load: OSError: no oil")


def test_versions_of_extras_are_no_requirements(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what to install where the package is absent; the first extra that names one counts."""
    lines = ["lamp>=2,<3", 'lamp==2.5; extra == "a"', 'oil==1.1; extra == "a"', 'oil==1.2; extra == "b"']
    monkeypatch.undo()
    monkeypatch.setattr(software, "requires", lambda _: lines)
    monkeypatch.setattr(software, "version", lambda _: "2.1")
    always, extras = software._pinned()
    assert [str(each.specifier) for each in always.values()] == ["<3,>=2"]
    assert [str(each.specifier) for each in extras.values()] == ["==1.1"]
    assert software.package("lamp", "json") == ok("lamp", "2.1")
    assert software.package("oil", "json", "dark") == ok("oil", "2.1")
    assert software._pip("oil") == "pip install 'oil==1.1'"


@pytest.mark.parametrize(("found", "status"), [("3.6.0", "ok"), ("3.7.1", "ok"), ("3.4.0", "absent")])
def test_triton_is_judged_by_the_kernels_tables(found: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch of another index brings another triton."""
    monkeypatch.setattr(software, "version", lambda _: found)
    row = software.triton()
    assert (row.status, row.found) == (status, found)
    assert ("tables for 3.6, 3.7" in row.advice) == (status == "absent")


@pytest.mark.parametrize("name", ["torch", "psutil"])
def test_a_package_that_the_doctor_needs_and_that_does_not_load(name: str, tmp_path: Path) -> None:
    put_package(tmp_path, name, "raise ImportError('libcudart.so.12: cannot open shared object file')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE}:{HERE}/kernels"}
    command = [sys.executable, "-m", "megabagel", "doctor", "--json", "--require", "cuda"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    rows = {entry["name"]: entry for entry in json.loads(ran.stdout)}
    assert rows[name]["status"] == "wrong" and "libcudart.so.12" in rows[name]["found"]
    assert rows["machine"]["advice"] == f"mend {name} first" and "cuda" not in rows


def test_transformer_engine_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_package(tmp_path, "transformer_engine", "raise RuntimeError('cudnn shared object not found.')")
    monkeypatch.syspath_prepend(tmp_path)
    found = software.transformer_engine()
    assert found.status == "wrong"
    assert "cudnn shared object not found" in found.found
    assert "pip uninstall transformer-engine" in found.advice


def test_apex_of_pypi_is_wrong(tmp_path: Path) -> None:
    """In a process of its own: the impostor must not stay in this one's modules."""
    put_package(tmp_path, "apex")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{HERE}:{HERE}/kernels"}
    command = [sys.executable, "-m", "megabagel", "doctor", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert ran.returncode == 1, ran.stderr
    (found,) = (entry for entry in json.loads(ran.stdout) if entry["name"] == "apex")
    assert found["status"] == "wrong"
    assert "pip uninstall apex" in found["advice"]


@pytest.mark.parametrize(
    ("env", "status", "says"),
    [
        ({}, "ok", "alone"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "ok", "torchrun: rank 1 of 4"),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
            "ok",
            "srun: rank 3 of 4, local rank 1",
        ),
        ({"RANK": "1"}, "wrong", "WORLD_SIZE"),
        ({"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, "wrong", "below the world size"),
    ],
)
def test_launch_variables(env: dict[str, str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = machine.launch(env)
    assert found.status == status
    assert says in found.found + found.advice


def test_variables_that_cost_speed() -> None:
    assert machine.environment({}).status == "ok"
    found = machine.environment({"CUDA_LAUNCH_BLOCKING": "1"})
    assert found.status == "wrong" and "CUDA_LAUNCH_BLOCKING: every kernel is waited for" in found.advice


def test_slurm_job_is_named() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
    assert machine.slurm(env) == ok("slurm", "job 7 on 2 nodes (n[0-1])")


def test_one_processor_of_many_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {5})
    found = machine.processors()
    assert found.status == "wrong" and "srun itself --cpus-per-task" in found.advice
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {5, 6})
    assert machine.processors() == ok("processors", "2 of 64")


def put_limit(folder: Path, name: str, limit: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{limit}\n")


def test_memory_limit_is_the_least_of_the_cgroups_around(tmp_path: Path) -> None:
    own, job = tmp_path / "cgroup", tmp_path / "system.slice" / "job_7"
    own.write_text("0::/system.slice/job_7/step_0\n")
    assert machine._cgroup_limit(own, tmp_path) is None
    put_limit(job / "step_0", "memory.max", "max")
    assert machine._cgroup_limit(own, tmp_path) is None
    put_limit(job, "memory.max", 5 << 30)
    put_limit(job.parent, "memory.max", 9 << 30)
    assert machine._cgroup_limit(own, tmp_path) == 5 << 30
    put_limit(tmp_path, "memory.max", 3 << 30)  # a container's own
    assert machine._cgroup_limit(own, tmp_path) == 3 << 30


def test_memory_limit_of_the_first_version(tmp_path: Path) -> None:
    own, name = tmp_path / "cgroup", "memory.limit_in_bytes"
    own.write_text("9:cpu,cpuacct:/a\n4:memory:/slurm/job_7\n0::/\n")
    put_limit(tmp_path / "memory", name, 2**63 - 4096)
    put_limit(tmp_path / "memory" / "slurm" / "job_7", name, 5 << 30)
    assert machine._cgroup_limit(own, tmp_path) == 5 << 30


def test_few_open_files_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 524288))
    found = machine.limits()
    assert (found.status, found.found) == ("wrong", "1024")
    assert "ulimit -n 4096 (at most 524288 here)" in found.advice


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.disk(tmp_path / "runs" / "a") == machine.disk(tmp_path)
    assert str(tmp_path) in machine.disk(tmp_path).found


def test_command_answers_in_json_and_refuses_unknown_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) in (0, 1)
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert {"torch", "megatron-core", "transformer-engine", "apex", "cuda", "memory", "disk", "launch"} <= set(names)
    assert len(names) == len(set(names))
    assert cli.main(["doctor", "--require", "tritium"]) == 2
    assert "tritium: no such row; expected some of python, torch" in capsys.readouterr().err
