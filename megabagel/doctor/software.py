"""Rows about packages: present, importable, recent enough, and the package that its name promises."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

from megabagel.doctor.row import Row, absent, ok, wrong
from megabagel.errors import UserError
from megabagel.runtime.packages import check_apex


def python() -> Row:
    """The interpreter; megatron-core 0.16.1 is the last release for Python below 3.12."""
    found = ".".join(map(str, sys.version_info[:3]))
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return wrong("python", found, "the project runs on 3.10 to 3.12: make a virtual environment with one of them")
    return ok("python", f"{found}, {sys.prefix}")


def _pinned() -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """Return the requirements of setup.py by name: those of every installation, and those of extras alone.

    Extras name the versions that were tested; other versions may work as well. Of several extras the first one counts.
    """
    try:
        wanted = [Requirement(line) for line in requires("megabagel") or ()]
    except PackageNotFoundError:  # run from a checkout that was not installed
        return {}, {}
    always = {each.name: each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})}
    return always, {each.name: each for each in reversed(wanted) if each.name not in always}


def _pip(name: str) -> str:
    """How to get a package."""
    always, extras = _pinned()
    wanted = always.get(name) or extras.get(name)
    return f"pip install '{name}{wanted.specifier if wanted else ''}'"


def package(name: str, module: str, cost: str | None = None) -> Row:
    """A package that only has to be there, in a version that every installation may have, and load.

    cost: what its absence means, for an optional one.
    """
    wanted, pip = _pinned()[0].get(name), _pip(name)
    try:
        found = version(name)
    except PackageNotFoundError:
        return absent(name, f"{cost}; {pip}") if cost else wrong(name, "not installed", pip)
    if wanted and not wanted.specifier.contains(found, prereleases=True):
        return wrong(name, found, f"expected {wanted.specifier}: {pip}")
    try:
        import_module(module)
    except Exception as error:
        return wrong(name, f"{found} does not load: {type(error).__name__}: {_first_line(error)}", pip)
    return ok(name, found)


def triton() -> Row:
    """Triton, which torch's CUDA builds bring in a version of their own: the kernels' tables decide."""
    row = package("triton", "triton", "no Triton kernels: attention runs on flex or host")
    if row.status != "ok":
        return row
    from megabagel_kernels.attention.configs import TABLE  # imports torch

    known = sorted({minor for minor, _, _ in TABLE})
    if ".".join(row.found.split(".")[:2]) in known:
        return row
    cost = f"attention runs on flex or host: its Triton kernels have tables for {', '.join(known)}; {_pip('triton')}"
    return Row(row.name, "absent", row.found, cost)


def transformer_engine() -> Row:
    """FP8 linears. Its presence alone is a danger: where it cannot load, importing megatron.core fails as well."""
    name, how = "transformer-engine", "pip install --no-build-isolation 'megabagel[gpu]'"
    if find_spec("transformer_engine") is None:
        return absent(name, f"no FP8: linears run in bf16; {how}, on GPU machines only")
    try:
        engine = import_module("transformer_engine.pytorch")
    except Exception as error:  # RuntimeError, OSError, FileNotFoundError: it raises them all
        fix = f"megatron-core will fail with it: pip uninstall transformer-engine, or on a GPU machine {how}"
        return wrong(name, f"does not load: {type(error).__name__}: {_first_line(error)}", fix)
    asked = {
        "fp8": "is_fp8_available",
        "fp8 block scaling": "is_fp8_block_scaling_available",
        "mxfp8": "is_mxfp8_available",
        "nvfp4": "is_nvfp4_available",
    }
    recipes = [label for label, probe in asked.items() if hasattr(engine, probe) and _available(getattr(engine, probe))]
    return ok(name, f"{version('transformer_engine')}; recipes here: {', '.join(recipes) or 'none'}")


def _available(probe: Callable[[], object]) -> bool:
    """Some releases answer with a reason beside the verdict."""
    answer = probe()
    return bool(answer[0] if isinstance(answer, tuple) else answer)


def apex() -> Row:
    """NVIDIA's Apex, or what calls itself so."""
    try:
        found = check_apex()
    except UserError as error:
        return wrong("apex", "not NVIDIA's, or without kernels", str(error))
    if not found:
        return absent("apex", "fused Adam and weight gradients come from Transformer Engine or torch; see setup.py")
    return ok("apex", "NVIDIA's, with CUDA kernels")


def software() -> Iterator[Row]:
    """All rows of this file. What is built on torch is not looked at where torch is not as it should be."""
    yield python()
    torch = package("torch", "torch")
    yield torch
    if torch.status == "ok":
        from megabagel.runtime import cpu_backend

        cpu_backend.quieten()  # and no more: what would end a run is a row here
        yield package("megatron-core", "megatron.core")
        yield transformer_engine()
        yield triton()
    yield apex()
    dali = next(
        (name for name in _pinned()[1] if name.startswith("nvidia-dali") and _installed(name)), "nvidia-dali-cuda130"
    )
    yield package(dali, "nvidia.dali", "images are decoded by engine host")
    for name in ("psutil", "tokenizers", "sentencepiece", "pyarrow", "tensorboard", "safetensors"):
        yield package(name, name)
    yield package("pillow", "PIL")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
