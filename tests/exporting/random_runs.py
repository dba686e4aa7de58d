"""Run directories whose networks have random weights: as good as trained ones for a round trip, and made in no time."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm_dist.build import build_model
from ddpm_dist.config import load_config, to_flat, to_yaml
from ddpm_dist.run.checkpoint import Checkpoint
from ddpm_dist.run.store import CheckpointStore

TINY_UNET = ("model.channels=8", "model.time_embed_dim=16")
TINY_UNET2D = (
    *("model.name=unet2d", "unet2d.block_out_channels=[8,16]", "unet2d.norm_num_groups=4"),
    *("unet2d.down_block_types=[DownBlock2D,AttnDownBlock2D]", "unet2d.up_block_types=[AttnUpBlock2D,UpBlock2D]"),
    "unet2d.layers_per_block=1",
)


def make_run(directory: Path, *overrides: str, channels: int = 1, num_classes: int = 0) -> Path:
    """A run of 8 x 8 images at step 5, with other weights in `ema` than in `model`."""
    config = load_config(None, [f"run.root={directory.parent}", "run.name=random", *overrides])
    shape = (channels, 8, 8)
    contract = {"image_shape": list(shape), "num_classes": num_classes, "channels_last": False}
    states = []
    for seed in range(2):
        network = build_model(config, shape, num_classes, torch.device("cpu"), channels_last=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in network.parameters():  # those that start at zero or one would hide a mistake
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        states.append(network.state_dict())
    window = torch.zeros(6, dtype=torch.float64)
    checkpoint = Checkpoint(5, states[0], states[1], {}, {}, window, to_flat(config), contract)
    CheckpointStore(directory / "checkpoints").save(checkpoint, {})
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory
