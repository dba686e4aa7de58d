"""Which images a command line asks for, and a trained run that is set up to draw them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_dist.errors import ConfigError
from ddpm_dist.evaluation.class_flags import ClassChoice
from ddpm_dist.evaluation.image_files import Target
from ddpm_dist.evaluation.sampler_flags import SamplerChoice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddpm_dist.diffusion.samplers import Sampler, SamplerOptions
    from ddpm_dist.evaluation.classes import Classes
    from ddpm_dist.loading import LoadedRun
    from ddpm_dist.parallel.environment import RankEnvironment


@dataclass(frozen=True)
class Request:
    """Which images are asked for, and where they go.

    Attributes:
        run: the run directory.
        num: number of images, at least 1.
        seed: at least 0.
        sampler: which sampler, and how it is set.
        step: step of the checkpoint; None for the newest valid one.
        weights: which weights of it; None for `ema`, or for those of a file.
        device: where the images are computed; auto is cuda if there is one.
        target: where the images go; None for a grid in the run directory.
        classes: which classes, and how they are guided.
    """

    run: Path
    num: int
    seed: int
    sampler: SamplerChoice
    step: int | None
    weights: str | None
    device: Literal["auto", "cpu", "cuda"]
    target: Target | None
    classes: ClassChoice = ClassChoice()

    @property
    def is_data_set(self) -> bool:
        """Whether the images are to be a data set, which is drawn as a job: it may be stopped, and goes on."""
        return self.target is not None and self.target.kind != "grid"

    def choices(self) -> dict[str, Any]:
        """All that was chosen and shapes the images, by the name of its flag."""
        elsewhere = ("run", "num", "sampler", "step", "weights", "device", "target", "classes")
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in elsewhere}
        of_sampler = dataclasses.asdict(self.sampler)
        return {"sampler": of_sampler.pop("name"), **of_sampler, **own, **self.classes.choices()}


@dataclass(frozen=True)
class Drawing:
    """A trained run that is set up to draw the images of a request.

    Attributes:
        request: which images.
        run: with its network on the device.
        sampler, options: the sampler, and how it is set.
        device: where the images are computed.
        classes: of which class each image is; None in a run without labels.
    """

    request: Request
    run: LoadedRun
    sampler: Sampler
    options: SamplerOptions
    device: torch.device
    classes: Classes | None

    @staticmethod
    def of(request: Request, device: torch.device, step: int | None) -> Drawing:
        """Load the run.

        Args:
            step: of the checkpoint; None for the newest valid one.

        Raises:
            UserError: the request cannot be met; the message says why.
        """
        from ddpm_dist.loading import load_run

        sampler = request.sampler.sampler()
        run = load_run(request.run, step, request.weights, device)
        options = request.sampler.options(run.process, run.config.diffusion.variance)
        return Drawing(request, run, sampler, options, device, request.classes.classes(run))

    def block(self, block: int, on_step: Callable[[], None]) -> Tensor:
        """Draw the images of a block, of which each has BLOCK_SIZE.

        Args:
            on_step: called after each call of the denoiser; may raise to stop.

        Returns:
            uint8 [BLOCK_SIZE, C, H, W], on the CPU.
        """
        from ddpm_dist.evaluation.generate import BLOCK_SIZE, generate_block

        return generate_block(
            self.run.denoiser(
                self.sampler.clips(self.options),
                self.request.classes.guidance,
                self.request.classes.interval,
                self.options.dynamic_threshold,
            ),
            self.run.process,
            self.sampler,
            shape=self.run.image_shape,
            first=block * BLOCK_SIZE,
            seed=self.request.seed,
            options=self.options,
            device=self.device,
            on_step=on_step,
            classes=self.classes,
        )

    def class_words(self) -> str:
        """What was chosen about classes and guidance, for the name of a file; empty if nothing was."""
        choice, only = self.request.classes, None if self.classes is None else self.classes.only
        parts = [
            *([f"-class{only}"] if only is not None else []),
            *([f"-guidance{choice.guidance:g}"] if choice.guidance != 1 else []),
            *([f"-in{choice.interval[0]}-{choice.interval[1]}"] if choice.interval else []),
        ]
        return "".join(parts)

    def num_calls(self) -> int:
        """How often a block calls `on_step`."""
        return self.sampler.num_calls(self.options, self.run.process)

    def stamp(self) -> dict[str, Any]:
        """All that the images follow from, as plain JSON."""
        facts = {
            "run": self.request.run.resolve().name,
            "step": self.run.step,
            "sha256": self.run.source_sha256,
            "weights": self.run.weights,
            **self.request.choices(),
            "class": None if self.classes is None else self.classes.only,
            "shape": self.run.image_shape,
            "device": self.device.type,  # each kind of device rounds in its own way
        }
        return dict(json.loads(json.dumps(facts)))

    def say_what_is_drawn(self, drawn: int = 0) -> None:
        """Print how many images there will be, of which size, and of which step.

        Args:
            drawn: how many of them are drawn already.
        """
        height, width = self.run.image_shape[1:]
        already = f", of which {drawn} are drawn already" if drawn else ""
        text = f"drawing {self.request.num} images of {height} x {width} from step {self.run.step}"
        print(text + ("" if self.classes is None else self.classes.words()) + already, file=sys.stderr, flush=True)


def device_for(requested: str, env: RankEnvironment) -> torch.device:
    """The device that this rank draws on.

    Args:
        requested: auto, cpu or cuda.

    Raises:
        ConfigError: there is none, or a node has fewer GPUs than ranks.
    """
    import torch

    from ddpm_dist.parallel.connection import pick_device

    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no CUDA device; valid here: auto, cpu")
    device = pick_device(requested, env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def draw_grid(request: Request, env: RankEnvironment, on_step: Callable[[], None] = lambda: None) -> Path:
    """Draw the images in this process alone, and write them as one grid.

    Args:
        on_step: called after each call of the denoiser; may raise to stop.

    Returns:
        the file that was written.

    Raises:
        UserError: the request cannot be met; the message says why.
    """
    from tqdm import tqdm

    from ddpm_dist.backends import configure_backends
    from ddpm_dist.evaluation.generate import BLOCK_SIZE
    from ddpm_dist.parallel.environment import cpu_threads

    drawing = Drawing.of(request, device_for(request.device, env), request.step)
    configure_backends(drawing.run.config.train, cpu_threads(env))
    target = request.target or _grid_of(drawing)
    num_blocks = -(-request.num // BLOCK_SIZE)
    try:
        target.probe(request.num)
        drawing.say_what_is_drawn()
        total = num_blocks * drawing.num_calls()
        with tqdm(total=total, unit="call", desc=f"{request.num} images", disable=None) as bar:

            def count() -> None:
                bar.update()
                on_step()

            blocks = [drawing.block(block, count) for block in range(num_blocks)]
        cut = (block[: request.num - BLOCK_SIZE * index] for index, block in enumerate(blocks))
        target.write(cut, request.num, drawing.classes)
    except OSError as error:
        raise target.cannot_be_written(error) from None
    return target.path


def _grid_of(drawing: Drawing) -> Target:
    """The grid in the run directory that is written unless another target is asked for."""
    request, run = drawing.request, drawing.run
    weights = "" if request.weights is None else f"-{run.weights}"
    name = f"{request.sampler.name}{weights}{drawing.class_words()}-seed{request.seed}-step-{run.step:08d}.png"
    return Target(run.directory.samples / name, "grid")
