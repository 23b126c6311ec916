"""What the GPU suite knows of the GPU that it runs on."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from gpu_suite_parts import layer, setting


def test_peak_is_that_of_the_device() -> None:
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "NVIDIA L4")
    assert [layer.peak_tflops(name) for name in names] == [989, 312, 756, None]


def test_clocks_are_those_of_this_processs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's device 0 is another one than nvidia-smi's under CUDA_VISIBLE_DEVICES."""
    asked: list[tuple[str, ...]] = []

    def output(*command: str) -> str:
        asked.append(command)
        return "570.1, 1980 MHz"

    monkeypatch.setattr(setting, "output", output)
    monkeypatch.setattr(setting.torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        setting.torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"aaaa-{number}")
    )
    assert setting.smi("driver_version", "clocks.sm") == {"driver_version": "570.1", "clocks.sm": "1980 MHz"}
    assert "--id=GPU-aaaa-3" in asked[0]
