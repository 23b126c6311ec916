"""The machine code of the kernels is what the stored table says, and a change is seen (tools/kernel_gate.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools import kernel_sources

TOOLS = Path(__file__).parents[2] / "tools"
RESULTS = TOOLS.parent / "benchmarks" / "results"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def sass() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sass", TOOLS / "sass.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the tool stands in for Triton's driver, and interpreted functions cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOLS / "kernel_gate.py"), "--check", *options]
    return subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def table() -> Path:
    import triton

    path = RESULTS / f"kernel_gate_triton-{triton.__version__}.json"
    if not path.exists():
        pytest.skip(f"no table for Triton {triton.__version__}")
    return path


@needs_triton
def test_some_kernels_are_as_stored():
    table()
    done = check("--arch", "90", "--only", "^forward: bf16, 28/4 heads of 128$|^swiglu|^fold_slice")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kernels, Triton ")


@needs_triton
def test_a_change_is_named(tmp_path: Path):
    rows = json.loads(table().read_text())
    fold = next(row for row in rows if row["kernel"] == "fold_slice" and row["arch"] == 90)
    found = fold["loops"][0]["instructions"]
    fold["loops"][0]["instructions"] = stored = int(found / 1.12)
    rows = [row for row in rows if row["kernel"] != "slice_gradient"]
    (tmp_path / table().name).write_text(json.dumps(rows))
    done = check("--arch", "90", "--only", "^fold_slice|^slice_gradient", "--out", str(tmp_path))
    assert done.returncode == 1
    changed, new, _ = done.stdout.splitlines()
    assert changed.startswith("sm_90 fold_slice: bf16 logits: loops ")
    assert f"'instructions': {stored}," in changed and f"'instructions': {found}," in changed
    assert new == "sm_90 slice_gradient: bf16 logits: not in the table"


PLANT = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_gate, triton
from megabagel_kernels.attention import configs
minor = triton.__version__.rpartition(".")[0]
configs.TABLE[minor, 90, "forward"] = configs.Config(128, 128, 4, 2)
configs.TABLE[minor, 90, "dq"] = configs.Config(128, 128, 8, 3)
for row in kernel_gate.measure([90], "^(forward|backward_dq): bf16, 28/4 heads of 128$"):
    print(row.kernel, *row.failures, sep="; ")
"""
"""Too few warps for the forward kernel, too many tiles in flight for dq."""


@needs_triton
def test_unfit_block_sizes_fail():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PLANT, str(TOOLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, dq = done.stdout.splitlines()
    assert "spills inside a loop" in forward and forward.endswith("; wgmma serialized")
    assert dq.startswith("backward_dq; ") and "bytes of shared memory, at most 232448" in dq


@needs_triton
@pytest.mark.thorough
def test_all_kernels_are_as_stored():
    table()
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gate_has_compiled_the_kernels_as_they_are():
    assert kernel_sources.changed() == [], "run tools/kernel_gate.py --check (minutes) and commit its record"


def test_the_digest_of_a_source_leaves_out_comments_and_docstrings(tmp_path: Path):
    one, same, other = (tmp_path / name for name in ("one.py", "same.py", "other.py"))
    one.write_text('"""A kernel."""\nWARPS = 4\n"""Measured."""\n')
    same.write_text("WARPS = 4  # measured\n")
    other.write_text("WARPS = 8  # measured\n")
    assert kernel_sources._digest(one) == kernel_sources._digest(same) != kernel_sources._digest(other)


def test_every_table_is_readable():
    versions = {path.stem.removeprefix("kernel_gate_triton-") for path in RESULTS.glob("kernel_gate_triton-*.json")}
    assert versions >= {"3.6.0", "3.7.1"}
    for version in versions:
        rows = json.loads((RESULTS / f"kernel_gate_triton-{version}.json").read_text())
        assert {row["arch"] for row in rows} == {80, 90, 100}


def listing(*instructions: str) -> str:
    """As cuobjdump prints it, with the encoding behind each instruction."""
    return "\n".join(f"        /*{16 * n:04x}*/   {text} ;   /* 0x00 */" for n, text in enumerate(instructions))


def test_loops_and_what_is_in_them(sass: ModuleType):
    work = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "STL.64 [R1], R2", "FADD R1, R2, R3"] * 9
    code = sass.Code(
        listing(
            "LDL R4, [R1]",  # before the loop: harmless
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
            "@!P0 BRA 0x10",  # waits
            *work,  # from 0x30 on
            "@P1 BRA 0x30",
            "@!PT IADD3 R1, R2, R3, RZ",
            "BRA.U !UP0, 0x10",  # around both
            "EXIT",
            *["NOP"] * 30,
            f"BRA 0x{16 * 34:x}",  # behind the end: not a loop of the kernel
        )
    )
    assert code.loops() == [sass.Loop(instructions=28, matrix=9, local=9)]
    assert code.names["IADD3"] == 1


def test_width_of_accesses(sass: ModuleType):
    code = sass.Code(listing("LDG.E.128.CONSTANT R4, [R2]", "@P0 LDG.E R4, [R2]", "LDG.E.U16 R4, [R2]",
                             "LDG.E.64 R4, [R2]", "STG.E.ENL2.256 [R2], R4", "LDGSTS.E [R2], R4"))  # fmt: skip
    assert code.wide_share("LDG") == round(16 / (16 + 4 + 2 + 8), 2)
    assert code.wide_share("STG") == 1.0
    assert code.wide_share("LD") == 0.0
