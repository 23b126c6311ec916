"""Throughput of a run: tokens per second, and model FLOPs utilization (MFU) in the two conventions in use.

`sequence/flops.py` and docs/architecture.md#mfu-in-two-conventions define them. Recomputed activations are not counted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from megabagel.config.schema import Config
from megabagel.sequence.flops import Flops

DENSE_BF16_TFLOPS = {
    "GB300": 2500,
    "B300": 2250,
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800 PCIe": 756,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
}
"""Peak without sparsity from the vendor's data sheets, by part of the device's name. The first match counts, so
longer names come first."""


class Peak(NamedTuple):
    """Peak FLOP/s of one device, and the source of the figure."""

    flops: float
    source: str


class StepTimer:
    """Wall seconds from the end of one step to the end of the next.

    So the wait for data, logging and polling count, as in the iteration times that other trainers print.
    """

    def __init__(self) -> None:
        self._ended = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds of the step that ends now."""
        before, self._ended = self._ended, time.perf_counter()
        return self._ended - before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out of the step what runs inside: held-out loss, samples and checkpoints, which few steps have."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._ended += time.perf_counter() - began


def peak_flops(config: Config, device: torch.device) -> Peak:
    """Return the peak of `device`: `telemetry.peak_tflops`, else the data sheet's, else a measured matmul's."""
    if config.telemetry.peak_tflops is not None:
        return Peak(config.telemetry.peak_tflops * 1e12, "telemetry.peak_tflops")
    if device.type == "cuda":
        known = data_sheet_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return _measured(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)


def data_sheet_peak(name: str) -> Peak | None:
    """Return the data-sheet peak of the GPU with this name, or None for an unknown one."""
    for part, tflops in DENSE_BF16_TFLOPS.items():
        if part in name:
            return Peak(tflops * 1e12, f"data sheet of {part}, dense bf16")
    return None


def rates(flops: Flops, tokens: int, seconds: float, devices: int, peak: Peak) -> dict[str, float]:
    """Return the speed of one step under the names of metrics.jsonl.

    Args:
        flops: of the step, summed over all devices.
        tokens: of the step, summed over all devices.
        seconds: wall time of the step.
        devices: number of ranks.
        peak: of one device.

    Returns:
        `mfu_official` and `mfu_masked`: model FLOPs per second over the peak of all devices, by convention.
        `vit_flops_per_s_per_gpu` and `vae_flops_per_s_per_gpu`: ViT tower and image autoencoder, which neither
        convention counts.
    """
    device_seconds = seconds * devices
    return {
        "tokens_per_s_per_gpu": tokens / device_seconds,
        "mfu_official": flops.official / device_seconds / peak.flops,
        "mfu_masked": flops.masked / device_seconds / peak.flops,
        "vit_flops_per_s_per_gpu": flops.vit / device_seconds,
        "vae_flops_per_s_per_gpu": flops.vae / device_seconds,
    }


def _measured(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the fastest of a few square matmuls; the first, a warm-up, is left out."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    name = str(dtype).removeprefix("torch.")
    return Peak(2 * side**3 / min(times[1:]), f"measured: {side} x {side} {name} matmul on {where}")
