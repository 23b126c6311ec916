"""Variables of GPU libraries: set before torch is imported, never against the user, and named where they cost speed."""

import subprocess
import sys
from pathlib import Path

import pytest

from megabagel.config.schema import ParallelConfig
from megabagel.runtime import gpu_environment
from megabagel.runtime.gpu_environment import missing, prepare, spoilers


def test_a_users_value_wins_also_under_an_older_name() -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    found = prepare(ParallelConfig(tp=2), env)
    assert "PYTORCH_ALLOC_CONF" not in env and env["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and missing(ParallelConfig(tp=2), env) == {}


def test_one_connection_under_tensor_parallelism_alone() -> None:
    assert missing(ParallelConfig(tp=2), {})["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in missing(ParallelConfig(cp=2), {})


def test_the_kernel_cache_is_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_environment.tempfile, "gettempdir", lambda: str(tmp_path))
    name = missing(ParallelConfig(), {})["TRITON_CACHE_DIR"]
    assert Path(name).parent == tmp_path and Path(name).stat().st_mode & 0o777 == 0o700
    Path(name).chmod(0o777)
    assert "TRITON_CACHE_DIR" not in missing(ParallelConfig(), {}), "others may write there"
    Path(name).rmdir()
    Path(name).symlink_to(tmp_path)
    assert "TRITON_CACHE_DIR" not in missing(ParallelConfig(), {}), "somebody else's link"


def test_what_costs_speed_is_named() -> None:
    assert spoilers({"CUDA_LAUNCH_BLOCKING": "0", "NCCL_DEBUG": "WARN"}) == []
    lines = spoilers({"CUDA_LAUNCH_BLOCKING": "1", "NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "info"})
    assert [line.partition(":")[0] for line in lines] == ["CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE", "NCCL_DEBUG"]


def test_it_is_set_before_torch_is_imported() -> None:
    code = "import sys, megabagel.commands.train, megabagel.runtime.gpu_environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
