"""The folder of a diffusers pipeline: network, scheduler, and a card that says what it is and how to draw from it.

The network unet2d is one of diffusers, so plain diffusers loads and samples from the folder without a line of ours. The
reference network unet is not; its folder carries the one module that it needs, beside the card.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ddpm_dist.diffusion.variance import VARIANCES
from ddpm_dist.errors import ConfigError
from ddpm_dist.exporting.card import write_card
from ddpm_dist.exporting.drawing_code import MODULE
from ddpm_dist.exporting.scheduler import scheduler_of
from ddpm_dist.loading import LoadedRun
from ddpm_dist.models import unet
from ddpm_dist.run.files import appearing
from ddpm_dist.run.weights_file import TO_INSTALL, plain

if TYPE_CHECKING:
    from diffusers import UNet2DModel

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def write_diffusers_folder(run: LoadedRun, out: Path, license_id: str | None) -> None:
    """Write the folder. `formats.Write` describes the arguments.

    Raises:
        ConfigError: diffusers is not installed; or the network is one of the user's own, or the prediction is not known
            to diffusers.
        OSError: it cannot be written.
    """
    name = run.config.model.name
    if name not in WRITERS:
        raise ConfigError(
            f"--to diffusers: model.name={name} is a network that diffusers does not have; it has "
            f"{', '.join(WRITERS)}. Valid for every network: --to safetensors"
        )
    try:
        from safetensors import SafetensorError

        scheduler = scheduler_of(run)
    except ImportError:
        raise ConfigError(f"--to diffusers: needs the diffusers package; {TO_INSTALL}") from None
    with appearing(out) as folder:
        try:
            scheduler.save_pretrained(folder / "scheduler")
            WRITERS[name](run, folder)
        except SafetensorError as error:  # its words for an error of the file system
            raise OSError(f"{out}: {error}") from None
        write_card(run, folder, license_id)


def _write_unet2d(run: LoadedRun, folder: Path) -> None:
    """The network and model_index.json, as diffusers itself writes them."""
    from diffusers import DDPMPipeline, DDPMScheduler

    network = as_diffusers_has_it(run.network)
    network.load_state_dict(plain(run.network.state_dict()))
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    DDPMPipeline(network, scheduler).save_pretrained(folder)


def as_diffusers_has_it(network: nn.Module) -> UNet2DModel:
    """diffusers' own class in place of ours, which derives from it; with new weights.

    Args:
        network: made for model.name=unet2d.
    """
    from diffusers import UNet2DModel

    return UNet2DModel.from_config(network.config)


def _write_unet(run: LoadedRun, folder: Path) -> None:
    """The reference network: its weights, the arguments with which it is built, and its module beside the card."""
    from safetensors.torch import save_file

    model = run.config.model
    arguments = {
        "image_channels": run.image_shape[0],
        "channels": model.channels,
        "time_embed_dim": model.time_embed_dim,
        "dropout": model.dropout,
        "out_channels": run.image_shape[0] * VARIANCES[run.config.diffusion.variance].num_parts,
        "num_classes": run.num_classes,
    }
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(arguments, indent=2) + "\n")
    save_file(plain(run.network.state_dict()), folder / "unet" / WEIGHTS_NAME, {"format": "pt"})
    shutil.copyfile(inspect.getfile(unet), folder / f"{MODULE}.py")


WRITERS: dict[str, Callable[[LoadedRun, Path], None]] = {"unet2d": _write_unet2d, "unet": _write_unet}
"""How each network is written, by the name that model.name gives it."""
