"""Compile every shipped Triton kernel for sm_80, sm_90 and sm_100 without a GPU and judge the machine code.

    python tools/kernel_gate.py           writes all or parts of OUT/kernel_gate_triton-VERSION.{md,json}
    python tools/kernel_gate.py --check   compares with these files instead, and names what differs
    python tools/kernel_gate.py --check --arch 90 --only 'forward.*28/4 heads of 128'

The version is that of the Triton that the interpreter imports. For another one (3.6.0 comes with torch 2.11) run it in
an environment with that one; its table is a file of its own. Exits with 1 if a kernel fails a gate or, with --check,
differs. A pass over all kernels is recorded in kernel_gate_sources.json: `make test` asks for another one when a source
has changed since, and compiles a few kernels only.

The real launch code runs, on CPU tensors, with a stand-in for the driver: so signatures, alignment, block sizes and
options are exactly those of a launch on the GPU. Gates: shared and tensor memory suffice; loops with matrix products do
not spill registers, and others hardly; attention uses the tensor cores and asynchronous copies of the architecture and
its products are not serialized; other kernels move most bytes in pieces of 16.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported: interpreted functions cannot be compiled

import kernel_sources
import triton
from megabagel_kernels import checks
from sass import Code
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

if TYPE_CHECKING:
    from kernel_gate_launches import Case

ARCHES = (80, 90, 100)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that one program can have."""
TENSOR_MEMORY = 512
"""Columns of a processor, sm_100."""
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The matrix products of each architecture."""
ATTENTION = ("forward", "backward_dq", "backward_dkv")
"""Bound by arithmetic; all others by memory."""
NARROW = {
    ("noise_patches", "LDG"): "two latent pixels of a patch are contiguous, 4 bytes",
    ("statistics", "STG"): "two numbers per row",
    ("fold_slice", "STG"): "two numbers per row",
}
"""What cannot move 16 bytes at once, and why."""
WIDE_SHARE = 0.4
"""Least part of a kernel's bytes that moves in pieces of 16 or more, loads and stores apart.

Numbers per row, which many threads read from one address, count as often as they are read."""
SPILL_SHARE = 0.02
"""Part of the instructions of a loop that may be spills, if it has no matrix products: those loops may have none."""
TOLERANCE = 0.1
"""Relative change of a number that `--check` lets pass."""
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    arch: int
    kernel: str
    case: str
    config: str
    registers: int
    spilled: int  # bytes stored, anywhere
    shared: int  # bytes
    tensor_memory: int  # columns
    loops: list[dict[str, int]]
    wide_loads: float
    wide_stores: float
    failures: list[str]

    @property
    def name(self) -> str:
        """What `--only` searches."""
        return f"{self.kernel}: {self.case}"


class Compiler:
    """Stands in for Triton's driver; while `recording`, every launch compiles its kernel and becomes a row."""

    def __init__(self, arch: int, only: str) -> None:
        self.arch, self.only = arch, only
        self.rows: list[Row] = []

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing is ever launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    @contextlib.contextmanager
    def recording(self, case: "Case") -> Iterator[None]:
        """Let launches compile, once per kernel."""
        run = JITFunction.run
        seen: set[str] = set()

        def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            name = f"{kernel.__name__}: {case.name}"
            if re.search(self.only, name) is None or name in seen:
                return
            seen.add(name)
            log = io.StringIO()
            kernel.device_caches.clear()  # what another case has compiled would have no log
            try:
                with contextlib.redirect_stdout(log):
                    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # whatever the compiler raises is a finding, not the end
                self.rows.append(_broken(self.arch, kernel.__name__, case, options, error))
            else:
                self.rows.append(_judge(self.arch, kernel.__name__, case, options, compiled, log.getvalue()))

        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run


def _judge(arch: int, kernel: str, case: "Case", options: dict[str, Any], compiled: Any, log: str) -> Row:
    code = Code(_disassembled(compiled.asm["cubin"]))
    meta = compiled.metadata
    tensor_memory = getattr(meta, "tmem_size", None) or 0
    loops = code.loops()
    failures = []
    if meta.shared > SHARED[arch]:
        failures.append(f"{meta.shared} bytes of shared memory, at most {SHARED[arch]}")
    if tensor_memory > TENSOR_MEMORY:
        failures.append(f"{tensor_memory} columns of tensor memory, at most {TENSOR_MEMORY}")
    spilling = [loop for loop in loops if loop.local > (0 if loop.matrix else SPILL_SHARE * loop.instructions)]
    failures += [f"{loop.local} spills inside a loop" for loop in spilling]
    if kernel not in ATTENTION:
        failures += _width_failures(kernel, code)
    elif case.tensor_cores:
        failures += _tensor_core_failures(arch, code, options["DESCRIPTOR"], log)
    return Row(
        arch, kernel, case.name, _config(options), _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log), meta.shared, tensor_memory,
        [asdict(loop) for loop in loops], code.wide_share("LDG"), code.wide_share("STG"), failures,
    )  # fmt: skip


def _tensor_core_failures(arch: int, code: Code, descriptors: bool, log: str) -> list[str]:
    copy = "UTMALDG" if descriptors else "LDGSTS"
    failures = [f"no {name}" for name in (MATRIX[arch], copy) if not code.names[name]]
    if not any(loop.matrix for loop in code.loops()):
        failures.append("no matrix products inside a loop")
    if re.search(r"\bC75\d\d\b|serializ", log):
        failures.append("wgmma serialized")
    return failures


def _width_failures(kernel: str, code: Code) -> list[str]:
    shares = {name: code.wide_share(name) for name in ("LDG", "STG") if (kernel, name) not in NARROW}
    return [f"{share:.0%} of {name} is wide" for name, share in shares.items() if share < WIDE_SHARE]


def _broken(arch: int, kernel: str, case: "Case", options: dict[str, Any], error: Exception) -> Row:
    reason = (str(error).strip().splitlines() or [""])[0]
    failure = f"does not compile: {type(error).__name__}: {reason}"
    return Row(arch, kernel, case.name, _config(options), 0, 0, 0, 0, [], 0.0, 0.0, [failure])


def _config(options: dict[str, Any]) -> str:
    """Block sizes x warps x stages, and for attention how tiles are reached; 3 stages are Triton's default."""
    block = " x ".join(str(options[name]) for name in ("ROWS", "COLS") if name in options) or "1 row"
    access = {True: ", descriptors", False: ", pointers", None: ""}[options.get("DESCRIPTOR")]
    heads = f", sums {options['HEADS']}" if "HEADS" in options else ""
    return f"{block}, w{options['num_warps']} s{options.get('num_stages', 3)}{access}{heads}"


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(arches: list[int], only: str) -> list[Row]:
    """Compile what `only` finds in the names of kernels and cases."""
    checks.check_launch = lambda kernel, x: None  # before the kernels import it: there is no GPU to insist on
    from kernel_gate_launches import cases

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    rows: list[Row] = []
    for arch in arches:
        compiler = Compiler(arch, only)
        driver.set_active(compiler)
        for case in cases():
            with compiler.recording(case):
                case.run(arch)
        rows += compiler.rows
    return rows


def differences(stored: list[Row], found: list[Row]) -> list[str]:
    """What `--check` prints: one line per row that is gone, new, or changed by more than `TOLERANCE`."""
    before, after = ({f"sm_{row.arch} {row.name}": row for row in rows} for rows in (stored, found))
    lines = [f"{key}: gone" for key in before if key not in after]
    lines += [f"{key}: not in the table" for key in after if key not in before]
    for key in before.keys() & after.keys():
        old, new = asdict(before[key]), asdict(after[key])
        lines += [f"{key}: {n} {old[n]} -> {new[n]}" for n in old if not _alike(old[n], new[n])]
    return sorted(lines)


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, dict):
        return all(_alike(old[name], new[name]) for name in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_alike, old, new))
    if isinstance(old, (int, float)):
        return bool(abs(new - old) <= TOLERANCE * old)
    return bool(old == new)


def markdown(rows: list[Row]) -> str:
    """The table, one part per architecture."""
    lines = [f"# Kernels compiled by Triton {triton.__version__}", "", *LEGEND]
    for arch in dict.fromkeys(row.arch for row in rows):
        lines += ["", f"## sm_{arch}", "", *HEADER, *(_line(row) for row in rows if row.arch == arch)]
    return "\n".join(lines) + "\n"


LEGEND = (
    "Made by `python tools/kernel_gate.py`, without a GPU. Config: block sizes, warps (w), pipeline stages (s).",
    "Loops: instructions (matrix products, spills) of each innermost loop; in attention full blocks come first.",
    "Wide: part of the bytes of loads / stores from global memory that moves in pieces of 16 or more.",
)
HEADER = (
    "| kernel | case | config | registers | spilled B | shared KiB | tensor columns | loops | wide | gate |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- |",
)


def _line(row: Row) -> str:
    loops = ", ".join(f"{x['instructions']} ({x['matrix']}, {x['local']})" for x in row.loops)
    wide = f"{row.wide_loads:.2f} / {row.wide_stores:.2f}"
    cells = (
        row.kernel, row.case, row.config, row.registers, row.spilled, f"{row.shared / 1024:.1f}", row.tensor_memory,
        loops or "none", wide, "; ".join(row.failures) or "passes",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _write(rows: list[Row], out: Path, name: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    (out / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    (out / f"{name}.md").write_text(markdown(rows))


def _read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def main() -> int:
    """Compile, judge, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored table instead of writing it")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHES, help="may be given several times")
    parser.add_argument("--only", default="", metavar="REGEX", help="kernels whose 'kernel: case' it matches")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables (default: %(default)s)")
    args = parser.parse_args()
    started, arches, name = time.monotonic(), args.arch or list(ARCHES), f"kernel_gate_triton-{triton.__version__}"
    stored = _read(args.out / f"{name}.json")
    rows = measure(arches, args.only)
    others = [row for row in stored if row.arch not in arches or not re.search(args.only, row.name)]
    if args.check:
        lines = differences([row for row in stored if row not in others], rows)
    else:
        lines = [f"sm_{row.arch} {row.name} ({row.config}): {failure}" for row in rows for failure in row.failures]
        _write(sorted(others + rows, key=lambda row: (row.arch, row.case, row.kernel)), args.out, name)
    if not lines and arches == list(ARCHES) and not args.only and args.out == RESULTS:
        kernel_sources.record()
    print(*lines, f"{len(rows)} kernels, Triton {triton.__version__}, {time.monotonic() - started:.0f} s", sep="\n")
    return 1 if lines or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
