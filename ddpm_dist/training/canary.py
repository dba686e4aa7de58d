"""The canary: 16 hexadecimal digits that show how this machine rounds."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from ddpm_dist.data.batches import Batch, blank
from ddpm_dist.data.images import Images
from ddpm_dist.randomness import generator, seed_default_generators
from ddpm_dist.training.step import Trainer


def canary(trainer: Trainer, images: Images, seed: int, num_timesteps: int) -> str:
    """Digest of the gradient of a small fixed batch at the weights of step 0.

    Machines on which the run goes on to the bit have the same canary, whatever the number of ranks. A machine that
    rounds differently has another one. The weights and gradients of the trainer do not change; weights that start at
    zero are random while the canary is computed.

    Args:
        trainer: at step 0, since the weights of step 0 are the only ones that every attempt has.
        images: only their shape and their conditions are used; the pixels are random.
        seed: run.seed.
        num_timesteps: T.

    Returns:
        16 hexadecimal digits.
    """
    assert trainer.step == 0, "the weights of step 0 are the only ones that every attempt has"
    probe = trainer.reduction.probe(trainer.model, trainer.micro_batch_size)
    draw = generator(seed, "canary")
    pixels = torch.randint(0, 256, (probe.num_images, *images.shape), dtype=torch.uint8, generator=draw)
    t = torch.randint(0, num_timesteps, (probe.num_images,), generator=draw)
    noise = torch.randn(pixels.shape, generator=draw)
    inputs = trainer.placement.inputs(Batch(pixels, t, noise, blank(images, probe.num_images).cond))
    seed_default_generators(trainer.ranks.device, seed, "canary dropout")
    threads = torch.get_num_threads()
    torch.set_num_threads(probe.num_threads or threads)
    with _no_weight_zero(trainer.model, draw):
        loss = trainer.loss.mean(probe.network, *inputs)
        gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    torch.set_num_threads(threads)
    digest = hashlib.blake2b(digest_size=8)
    for gradient in gradients:
        digest.update(gradient.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _no_weight_zero(model: nn.Module, draw: torch.Generator) -> Iterator[None]:
    """Inside the `with`, weights that are zero throughout are random, but for biases and scales.

    A network whose last layer starts at zero, as those of Ho et al. do, gives no gradient to the layers before it. The
    canary would not tell how these round.

    Args:
        draw: the generator of these weights.
    """
    zeros = [weight for weight in model.parameters() if weight.ndim >= 2 and not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=draw))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()
