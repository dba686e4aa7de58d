"""Builds the trainer of a run from its config and from the choices that were made at step 0."""

from __future__ import annotations

import torch

from ddpm_dist.build import build_averages, build_loss, build_model, build_process
from ddpm_dist.config import Config
from ddpm_dist.data.batches import Placement
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.reduction import MeanReduction, Reduction, TreeReduction
from ddpm_dist.training.optim import build_optimizer, learning_rate
from ddpm_dist.training.precision import Numerics
from ddpm_dist.training.statistics import Statistics
from ddpm_dist.training.step import Trainer
from ddpm_dist.training.update import Update


def build_trainer(
    config: Config,
    ranks: Ranks,
    numerics: Numerics,
    image_shape: tuple[int, int, int],
    num_classes: int = 0,
    decay_steps: int | None = None,
) -> Trainer:
    """Build a trainer at step 0, with the weights that follow from run.seed. Collective.

    Args:
        config: of the run.
        ranks: this process and its peers.
        numerics: the choices that were made at step 0.
        image_shape: (C, H, W).
        num_classes: number of classes of the labels; 0 without labels.
        decay_steps: the step at which the cosine ends; None for a constant learning rate.
    """
    model = build_model(config, image_shape, num_classes, ranks.device, numerics.channels_last)
    network: torch.nn.Module = torch.compile(model) if numerics.compile else model  # type: ignore[assignment]
    parameters = list(model.parameters())
    images_per_rank = config.data.batch_size // ranks.world_size
    # DDP goes around the compiled network, so that its gradient traffic still overlaps with the backward pass.
    reduction: Reduction
    if config.elastic.mode == "bitwise":
        reduction = TreeReduction(network, parameters, ranks, config.elastic.shards)
    else:
        num_micro_batches = max(1, images_per_rank // (config.train.micro_batch_size or images_per_rank))
        reduction = MeanReduction(network, ranks, config.elastic.shards, num_micro_batches)
    return Trainer(
        ranks=ranks,
        seed=config.run.seed,
        model=model,
        placement=Placement(ranks.device, numerics.channels_last),
        micro_batch_size=images_per_rank // reduction.num_micro_batches,
        loss=build_loss(config, build_process(config, ranks.device), lambda: numerics.autocast(ranks.device)),
        reduction=reduction,
        update=Update(
            parameters,
            build_optimizer(model, config.optim),
            numerics.scaler(ranks.device),
            lambda step: learning_rate(step, config.optim, decay_steps),
            config.optim.grad_clip,
            reduction,
        ),
        averages=build_averages(config, model),
        statistics=Statistics(ranks),
    )
