"""The wrong Apex is refused by name, the absent one is fine."""

from pathlib import Path

import pytest

from megabagel.errors import UserError
from megabagel.runtime.packages import APEX_KERNELS, check_apex


def _apex(folder: Path, *files: str) -> None:
    for name in ("apex/__init__.py", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert check_apex() is False


def test_the_one_on_pypi_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _apex(tmp_path, "apex/lib/subscribers.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"not NVIDIA Apex .* pip uninstall apex"):
        check_apex()


def test_one_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _apex(tmp_path, "apex/optimizers/fused_adam.py", "amp_C.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="fused_layer_norm_cuda, fused_weight_gradient_mlp_cuda missing"):
        check_apex()


def test_a_whole_one_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _apex(tmp_path, "apex/optimizers/fused_adam.py", *(f"{name}.py" for name in APEX_KERNELS))
    monkeypatch.syspath_prepend(tmp_path)
    assert check_apex() is True
