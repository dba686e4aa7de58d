"""README.md of an exported folder, as the Hugging Face hub shows it: what the model is, how it was made, how to use it.

It says what the run knows and nothing else. It names no licence unless the user gives one.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ddpm_dist
from ddpm_dist.config import from_flat, unlike_the_defaults
from ddpm_dist.exporting.drawing_code import MODULE, drawing_code
from ddpm_dist.exporting.grid import write_grid
from ddpm_dist.exporting.shareable import shareable_config
from ddpm_dist.loading import LoadedRun
from ddpm_dist.tracking.journal import read_metrics

GRID = "grid.png"
TERMS = (
    *("images", "num_images", "image_shape", "num_classes", "class_names"),
    *("precision", "compile", "channels_last", "device", "torch", "arithmetic", "deviations"),
)
"""The terms of the contract that matter to who uses the model."""


def write_card(run: LoadedRun, folder: Path, license_id: str | None) -> None:
    """Write README.md, and the grid of samples that it shows.

    Args:
        folder: of the export; the code of the card is executed there.
        license_id: the licence of the weights as the hub names it; None for a card that names none.

    Raises:
        OSError: they cannot be written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    of_diffusers = run.config.model.name == "unet2d"
    data = ModelCardData(
        license=license_id,
        library_name="diffusers" if of_diffusers else None,
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", "pytorch", "ddpm_dist"],
    )
    parts = [
        f"# {run.config.run.name}",
        f"A denoising diffusion model of {_size(run)} images of the data set `{run.config.data.name}`, trained by "
        f"ddpm_dist {ddpm_dist.__version__} to step {run.step}. These are its weights `{run.weights}`.",
        f"![samples]({GRID})",
        write_grid(run, folder / GRID),
        "## How to draw images",
        _how_to_load(of_diffusers),
        *(f"{what}:\n\n```python\n{code}```" for what, code in drawing_code(run).items()),
        "## How it was made",
        _command(run),
        *_metrics(run),
        "What was decided at step 0 and held for the whole run:",
        _table({name: run.contract[name] for name in TERMS if run.contract.get(name) not in (None, [], "")}),
        f"The weights are those of a checkpoint whose file has the sha256 `{run.source_sha256}`.",
        "All keys of the config:",
        _table(shareable_config(run.config)),
    ]
    text = "\n\n".join(parts)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    ModelCard.load(folder / "README.md")


def _size(run: LoadedRun) -> str:
    channels, height, width = run.image_shape
    return f"{height} x {width} {'grey' if channels == 1 else 'colour'}"


def _how_to_load(of_diffusers: bool) -> str:
    if of_diffusers:
        return "The network and the scheduler are diffusers' own. In this folder:"
    return (
        f"The network is not one of diffusers, which cannot load it by itself: it is in `{MODULE}.py`, a module that "
        "needs only torch. The scheduler is diffusers' own. In this folder:"
    )


def _command(run: LoadedRun) -> str:
    """The command of the training, with the keys that are not those of the reference recipe."""
    words = unlike_the_defaults(from_flat(shareable_config(run.config)))
    return f"```sh\npython -m ddpm_dist.train {shlex.join(words)}\n```"


def _metrics(run: LoadedRun) -> list[str]:
    """The last line of metrics.jsonl up to the step, if the run has one."""
    records = [record for record in read_metrics(run.directory.metrics_file) if record["step"] <= run.step]
    if not run.path.is_dir() or not records:
        return []
    return [f"Its last figures, of step {records[-1]['step']}:", _table(records[-1])]


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"| `{name}` | `{json.dumps(value)}` |" for name, value in values.items())
    return "\n".join(["| | |", "|---|---|", *rows])
