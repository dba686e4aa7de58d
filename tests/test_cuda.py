"""What only GPUs can show. `pytest -m cuda` on a machine with one or two of them; skipped elsewhere."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from harness import final_state, metrics, start, state_differences, status, train, wait_for_step

ON_CUDA = ("train.device=cuda", "train.max_steps=40", "checkpoint.every=7", "model.channels=32", "data.batch_size=64")

worlds = pytest.mark.parametrize(
    "world_size",
    [
        pytest.param(size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"wants {size} GPU(s)"))
        for size in (1, 2)
    ],
)
pytestmark = pytest.mark.cuda


@worlds
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_precision_learns_and_draws(tmp_path: Path, world_size: int, precision: str) -> None:
    run = train(
        world_size, tmp_path, *ON_CUDA, f"train.precision={precision}", "preview.num_images=4", "preview.steps=5"
    )
    losses = [record["loss"] for record in metrics(run)]
    assert losses[-1] < 0.5 * losses[0]
    assert (run / "samples" / "step-00000040.png").exists()


@worlds
def test_loss_curve_is_that_of_the_cpu(tmp_path: Path, world_size: int) -> None:
    """Timesteps and noise come from the CPU's generator, so another device computes the same thing."""
    gpu = train(world_size, tmp_path, *ON_CUDA, "train.precision=fp32", name="gpu")
    cpu = train(1, tmp_path, *ON_CUDA, "train.precision=fp32", "train.device=cpu", name="cpu")
    for left, right in zip(metrics(gpu), metrics(cpu), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-2)


@worlds
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_killed_run_resumes_on_its_curve(tmp_path: Path, world_size: int, precision: str) -> None:
    """Bit for bit is not promised on a GPU yet: some CUDA kernels add in an order of their own."""
    overrides = (*ON_CUDA, f"train.precision={precision}")
    undisturbed = train(world_size, tmp_path, *overrides, name="undisturbed")
    run = tmp_path / "killed"
    with start(world_size, tmp_path, *overrides, name="killed") as job:
        wait_for_step(job, run, 20, 1)
        job.kill()
    train(world_size, tmp_path, *overrides, name="killed")
    print("differences to the bit:", state_differences(undisturbed, run))
    resumed = {record["step"]: record for record in metrics(run)}
    for record in metrics(undisturbed):
        assert resumed[record["step"]]["loss"] == pytest.approx(record["loss"], rel=2e-2)
    if precision == "fp16":
        assert final_state(run)["scaler"] == final_state(undisturbed)["scaler"]


@worlds
def test_sigterm_saves(tmp_path: Path, world_size: int) -> None:
    with start(world_size, tmp_path, *ON_CUDA, "train.max_steps=100000") as job:
        wait_for_step(job, tmp_path / "run", 10, 1)
        job.signal(world_size - 1, signal.SIGTERM)
        assert job.wait(60) == [75] * world_size, job.output()
    assert status(tmp_path / "run")["state"] == "preempted"


@worlds
def test_compiled_channels_last_learns(tmp_path: Path, world_size: int) -> None:
    run = train(world_size, tmp_path, *ON_CUDA, "train.compile=true", "train.channels_last=true")
    losses = [record["loss"] for record in metrics(run)]
    assert losses[-1] < 0.5 * losses[0]
    assert not any("_orig_mod" in name or "module." in name for name in final_state(run)["model"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants 2 GPU(s)")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_bitwise_mode_ends_alike_on_one_gpu_and_two(tmp_path: Path, precision: str) -> None:
    options = (*ON_CUDA, "elastic.mode=bitwise", f"train.precision={precision}", "optim.grad_clip=0.5")
    one, two = (train(size, tmp_path, *options, name=f"w{size}") for size in (1, 2))
    assert state_differences(one, two) == []
