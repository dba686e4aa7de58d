"""PNG files: grids of images, and the curves of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_dist.run.files import replacing

SEEN_SIZE = 64  # pixels on a screen; a digit of 16 pixels is hard to see there


def save_png(image: Tensor, path: Path, durable: bool = True) -> None:
    """Write a PNG, which replaces `path` in one step.

    Args:
        image: uint8 [C, H, W] in [0, 255], C = 1 or 3.
        durable: that of `replacing`.

    Raises:
        OSError: the file cannot be written.
    """
    from torchvision.transforms.functional import to_pil_image

    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, format="PNG")
    with replacing(path, durable=durable) as file:
        file.write(buffer.getvalue())


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write the images as one PNG, in a grid.

    Small images are enlarged for the eye, each pixel to a square of so many pixels that an image gets up to SEEN_SIZE.

    Args:
        images: uint8 [N, C, H, W] in [0, 255], N at least 1, C = 1 or 3.
        columns: of the grid; None for one that is as square as possible.

    Raises:
        OSError: the file cannot be written.
    """
    from torchvision.utils import make_grid

    factor = max(1, SEEN_SIZE // max(images.shape[2:]))
    seen = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    save_png(make_grid(seen, nrow=columns or math.ceil(math.sqrt(len(images))), padding=2), path)


def save_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss and gradient norm (on log scales) and learning rate over the steps, as a PNG.

    Args:
        records: the lines of metrics.jsonl.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (name, scale) in zip(
        figure.subplots(1, 3), (("loss", "log"), ("grad_norm", "log"), ("lr", "linear")), strict=True
    ):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
        axes.set(title=name, xlabel="step", yscale=scale)
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    with replacing(path) as file:
        file.write(buffer.getvalue())
