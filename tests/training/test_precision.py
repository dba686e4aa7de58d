"""What the user says is obeyed; what is left to `auto` follows the hardware, and is decided in one place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ddpm_dist.backends import configure_backends
from ddpm_dist.config import TrainConfig
from ddpm_dist.training.precision import Numerics, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def switches() -> Iterator[None]:
    """Puts the process-wide switches back."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn


def numerics(precision: str) -> Numerics:
    return Numerics(precision=precision, compile=False, channels_last=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capable", [True, False])
def test_explicit_precision_is_obeyed_on_any_hardware(
    monkeypatch: pytest.MonkeyPatch, precision: str, capable: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": capable, "avx512_bf16": capable})
    assert resolve(TrainConfig(precision=precision), CPU).precision == precision  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": False, "avx2": True, "avx512_f": True}, "fp32"),
        ({}, "fp32"),
    ],
    ids=["amx", "avx512", "no native bf16", "unknown processor"],
)
def test_auto_on_a_cpu_is_bf16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve(TrainConfig(), CPU).precision == precision


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_on_a_gpu_follows_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve(TrainConfig(), CUDA).precision == precision


@pytest.mark.parametrize(("choice", "on"), [("auto", False), ("false", False), ("true", True)])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_compile_is_on_only_when_asked_for(choice: str, on: bool, device: torch.device) -> None:
    assert resolve(TrainConfig(precision="fp32", compile=choice), device).compile is on  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_channels_last_is_obeyed_or_on_where_it_was_measured_to_gain(device: torch.device, precision: str) -> None:
    def resolved(choice: str) -> bool:
        return resolve(TrainConfig(precision=precision, channels_last=choice), device).channels_last  # type: ignore[arg-type]

    assert resolved("true") is True
    assert resolved("false") is False
    assert resolved("auto") is (device == CPU and precision == "fp32")


def test_channels_last_follows_the_precision_that_auto_was_resolved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, on in ((True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"amx_bf16": native})
        assert resolve(TrainConfig(), CPU).channels_last is on


@pytest.mark.parametrize(("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_scaler_is_enabled_for_fp16_alone(precision: str, enabled: bool) -> None:
    assert numerics(precision).scaler(CPU).is_enabled() is enabled


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_disabled_scaler_changes_no_number(precision: str) -> None:
    loss = torch.tensor(3.0, requires_grad=True)
    assert torch.equal(numerics(precision).scaler(CPU).scale(loss), loss)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_under_autocast_have_the_chosen_type(precision: str, dtype: torch.dtype) -> None:
    one = torch.ones(2, 2)
    with numerics(precision).autocast(CPU):
        assert (one @ one).dtype == dtype
    assert (one @ one).dtype == torch.float32


@pytest.mark.usefixtures("switches")
def test_backends_get_the_threads_and_never_choose_kernels_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # the machine running the tests is shared
    torch.backends.cudnn.benchmark = True
    configure_backends(TrainConfig(), threads=7)
    assert asked == [7]
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(("precision", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_tf32_is_allowed_only_below_the_highest_matmul_precision(precision: str, tf32: bool) -> None:
    configure_backends(TrainConfig(matmul_precision=precision), threads=1)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 is tf32
