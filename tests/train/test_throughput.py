from types import SimpleNamespace

import pytest
import torch

from megabagel.config.schema import Config, TelemetryConfig, TrainConfig
from megabagel.sequence.flops import Flops
from megabagel.train.throughput import Peak, StepTimer, peak_flops, rates

CPU = torch.device("cpu")


def test_configured_peak_counts_first() -> None:
    assert peak_flops(Config(telemetry=TelemetryConfig(peak_tflops=2.5)), CPU) == Peak(2.5e12, "telemetry.peak_tflops")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(Config(), torch.device("cuda", 0))
    assert peak.flops == tflops * 1e12
    assert "data sheet" in peak.source


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_peak_of_a_cpu_is_measured_in_the_precision_of_training(precision: str, dtype: str) -> None:
    peak = peak_flops(Config(train=TrainConfig(precision=precision)), CPU)
    assert 1e8 < peak.flops < 1e14
    assert peak.source.startswith(f"measured: 1024 x 1024 {dtype} matmul on cpu")


def test_rates_are_per_device() -> None:
    flops = Flops(official=6e12, masked=3e12, vit=8e11, vae=2e11)
    found = rates(flops, 1000, 0.5, 4, Peak(10e12, "telemetry.peak_tflops"))
    assert found == {
        "tokens_per_s_per_gpu": 500.0,
        "mfu_official": pytest.approx(0.3),
        "mfu_masked": pytest.approx(0.15),
        "vit_flops_per_s_per_gpu": 4e11,
        "vae_flops_per_s_per_gpu": 1e11,
    }


def test_a_step_lasts_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for data and logging count; evaluation and checkpoints do not."""
    now = [100.0]
    monkeypatch.setattr("megabagel.train.throughput.time", SimpleNamespace(perf_counter=lambda: now[0]))
    timer = StepTimer()
    now[0] += 3  # data, forward, backward
    assert timer.lap() == 3
    now[0] += 1  # logging
    with timer.apart():
        now[0] += 50
    now[0] += 4
    assert timer.lap() == 5
