"""Text output of `megabagel plan`: the best grids, one grid in detail, or why none fits."""

from collections.abc import Mapping, Sequence

from megabagel.planner.calibration import Calibration
from megabagel.planner.estimate import SAFE, WORDS, Estimate, Planner
from megabagel.planner.memory import GIB
from megabagel.planner.search import Found, shapes
from megabagel.planner.stage_estimate import COPY_GB_S, Campaign, campaign

SHOWN = 5
COLUMNS = ("grid", "s/step", "tokens/s/GPU", "MFU official", "MFU masked", "GiB")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells in aligned columns: first row is the heading, first column left-aligned, others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def opening(planner: Planner, gpus: int) -> str:
    """Header of the report: GPUs, packs, and where the efficiency constants come from."""
    config, work, gpu = planner.config, planner.workload, planner.gpu
    return (
        f"{gpus} x {gpu.name} ({gpu.memory_gib:.0f} GiB, {gpu.peak(config.train.precision) / 1e12:.0f} TFLOP/s "
        f"{config.train.precision}); {config.train.packs_per_step} packs per step of {work.tokens:,.0f} tokens "
        f"({work.gen_share:.0%} generated), typical samples of {len(config.data.sources)} sources\n"
        f"{_constants(planner.constants)}"
    )


def _constants(constants: Calibration) -> str:
    if constants.measured == 1:
        return "speeds: constants fitted on published systems; nothing was measured on these GPUs (--calibration FILE)"
    return f"speeds: corrected by {constants.measured:.2f} after measurements in {constants.source}"


def best(found: Found) -> str:
    """Table of the fastest grids that fit, with limits, overrides and stage estimate of the first."""
    chosen = shapes(found.fitting, SHOWN)
    rows = [COLUMNS, *(_row(estimate) for estimate in chosen)]
    first = chosen[0]
    return "\n".join([
        f"{len(found.fitting)} of {found.legal} legal grids fit. The best of the fastest shapes:",
        table(rows),
        "",
        f"why the first: {first.limit}",
        f"to run it: {first.case.grid.overrides(first.workload.config)}",
        "",
        stage(first),
    ])  # fmt: skip


def _row(estimate: Estimate) -> tuple[str, ...]:
    return (
        f"{estimate.case.grid}" + (" fp32" if estimate.case.grid.precision == "fp32" else ""),
        f"{estimate.time.seconds:.2f}",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu_official:.1%}",
        f"{estimate.mfu_masked:.1%}",
        f"{estimate.memory.gib:.1f}",
    )


def stage(estimate: Estimate) -> str:
    """Duration, energy, checkpoints and CPU memory of the whole training stage at the estimated speed."""
    plan, gpu = campaign(estimate), estimate.case.gpu
    host = "enough" if plan.host_enough else f"MORE than the {gpu.host_gib:.0f} GiB that a GPU's share is"
    return "\n".join([
        f"stage: {estimate.case.config.train.steps:,} steps, {plan.tokens / 1e12:.3g}T tokens: {plan.days:,.1f} days, "
        f"{plan.megawatt_hours:,.0f} MWh at {gpu.server_watt:.0f} W per GPU with its server",
        f"checkpoints: {plan.checkpoint_gib:,.0f} GiB each, {_written(estimate, plan)}; every "
        f"{plan.interval_steps:,} steps loses the least (checkpoint.every = {estimate.case.config.checkpoint.every}); "
        f"{plan.kept_gib:,.0f} GiB of disk",
        f"host memory: {plan.host_gib:.0f} GiB per GPU, {host}",
    ])  # fmt: skip


def _written(estimate: Estimate, plan: Campaign) -> str:
    seconds = f"{plan.checkpoint_seconds:.0f} s to write"
    if not estimate.case.config.checkpoint.async_save:
        return f"{seconds} while training waits"
    return f"{seconds} beside the next steps after {plan.pause_seconds:.2f} s to copy (assumed {COPY_GB_S:.0f} GB/s)"


def refusal(planner: Planner, gpus: int, found: Found, remedy: str) -> str:
    """Error message where no grid fits: the closest grid, its largest categories, and a remedy.

    Args:
        planner: config and GPU of the search.
        gpus: ranks of the job.
        found: result of the search; all its grids are too large.
        remedy: sentence from `search.what_would_fit`.
    """
    closest = found.too_large[0]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in _largest(closest.memory.parts)[:3])
    return (
        f"--gpus {gpus} --gpu {planner.gpu.name}: none of {found.legal} legal grids fits into "
        f"{SAFE:.0%} of {planner.gpu.memory_gib:.1f} GiB. The closest, {closest.case.grid}, takes "
        f"{closest.memory.gib:.1f} GiB ({parts}). {remedy[0].upper()}{remedy[1:]}."
    )


def _largest(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda part: part[1], reverse=True)


def explain(estimate: Estimate) -> str:
    """Detail of one grid: memory by category on its fullest rank, and seconds of a step by phase."""
    memory, time = estimate.memory, estimate.time
    by_size = [(name, f"{size / GIB:.2f}") for name, size in _largest(memory.parts) if size]
    by_time = [(name, f"{s:.3f}", f"{s / time.seconds:.1%}", WORDS[name]) for name, s in _largest(time.phases)]
    fits = "fits" if estimate.fits else "does NOT fit"
    return "\n".join([
        f"{estimate.case.grid}, {estimate.case.grid.precision}: {fits}",
        estimate.limit,
        "",
        f"memory of pipeline rank {memory.rank}, GiB (of {estimate.case.gpu.memory_gib:.1f})",
        table([("category", "GiB"), *by_size, ("total", f"{memory.gib:.2f}")]),
        "",
        f"one step, seconds (slowest pipeline rank: {time.slowest}; {estimate.case.micro_batches} micro-batches)",
        table([("phase", "s", "share", ""), *by_time, ("total", f"{time.seconds:.3f}", "", "")]),
        "",
        table([COLUMNS, _row(estimate)]),
        "",
        stage(estimate),
    ])  # fmt: skip
