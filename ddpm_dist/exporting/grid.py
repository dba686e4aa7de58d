"""The grid of samples of an export: the run's own newest one, or one that is drawn now."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from ddpm_dist.diffusion.samplers import SAMPLERS, SamplerOptions
from ddpm_dist.evaluation.classes import Classes
from ddpm_dist.evaluation.generate import generate_blocks
from ddpm_dist.evaluation.pictures import save_grid
from ddpm_dist.loading import LoadedRun

NUM_DRAWN = 16


def write_grid(run: LoadedRun, path: Path) -> str:
    """Write the grid as a PNG.

    The run draws its previews from the weights that preview.weights names. For other weights, and where there is no
    preview, images are drawn by DDIM.

    Returns:
        a sentence for the reader that says how the images were drawn.

    Raises:
        OSError: it cannot be written.
    """
    newest = _newest_preview(run)
    if newest is not None:
        shutil.copyfile(newest, path)
        preview = run.config.preview
        return (
            f"The samples were drawn at step {int(newest.stem.removeprefix('step-'))}, by the sampler "
            f"`{preview.sampler}` with seed {preview.seed}. Nobody chose them."
        )
    print(f"drawing {NUM_DRAWN} images for the card", file=sys.stderr, flush=True)
    sampler, classes = SAMPLERS["ddim"], Classes(run.num_classes) if run.num_classes else None
    blocks = generate_blocks(
        run.denoiser(sampler.clip),
        run.process,
        sampler,
        shape=run.image_shape,
        num=NUM_DRAWN,
        seed=0,
        options=SamplerOptions(),
        device=run.process.betas.device,
        on_step=lambda: None,
        block_size=NUM_DRAWN,
        classes=classes,
    )
    save_grid(torch.cat(list(blocks)), path)
    of_classes = ", of the classes in turn" if classes else ""
    return f"The samples were drawn by the sampler `ddim` with seed 0{of_classes}. Nobody chose them."


def _newest_preview(run: LoadedRun) -> Path | None:
    """The newest preview up to the step of the weights; None if it was not drawn from these weights."""
    if run.weights != run.config.preview.weights or not run.path.is_dir():
        return None
    found = sorted(run.directory.samples.glob("step-*.png"))
    return next((path for path in reversed(found) if int(path.stem.removeprefix("step-")) <= run.step), None)
