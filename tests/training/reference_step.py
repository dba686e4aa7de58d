"""What a run learns, written straight down for one process: the yardstick of `test_against_reference.py`."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddpm_dist.models.unet import UNet
from ddpm_dist.randomness import derive_seed, generator


def global_batch(images: Tensor, labels: Tensor, r: Any, step: int) -> list[Tensor]:
    """x_start, t, noise and labels of a step: those of its logical shards, one after the other."""
    shards, b, epoch_length = [], r.batch_size // r.shards, len(images) // r.batch_size
    for shard in range(r.shards):
        numbers: Any = range(len(images))
        order: Any = DistributedSampler(numbers, r.shards, shard, seed=derive_seed(r.seed, "order"), drop_last=True)
        order.set_epoch(step // epoch_length)
        indices = list(order)[step % epoch_length * b :][:b]
        x, classes = images[indices], labels[indices]
        hidden = torch.rand(b, generator=generator(r.seed, "label dropout", step, shard)) < r.label_dropout
        classes = torch.tensor([r.classes if hide else int(label) for label, hide in zip(classes, hidden, strict=True)])
        if r.flip:
            mirrored = torch.rand(b, generator=generator(r.seed, "flip", step, shard)) < 0.5
            x = torch.stack([image.flip(-1) if flip else image for image, flip in zip(x, mirrored, strict=True)])
        draw = generator(r.seed, "noise", step, shard)
        t = torch.randint(0, 1000, (b,), generator=draw)
        shards.append((x.float() / 127.5 - 1, t, torch.randn(x.shape, generator=draw), classes))
    return [torch.cat(parts) for parts in zip(*shards, strict=True)]


def noise_schedule(r: Any) -> Tensor:
    """ᾱ, float64 [1000]."""
    if r.schedule in ("linear", "scaled_linear"):
        power = {"linear": 1, "scaled_linear": 2}[r.schedule]
        betas = torch.linspace(1e-4 ** (1 / power), 0.02 ** (1 / power), 1000, dtype=torch.float64) ** power
    else:
        times = torch.arange(1001, dtype=torch.float64) / 1000
        low, high = (1 / (1 + math.exp(-x / 0.9)) for x in (-3, 3))
        curves = {
            "cosine": torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2,
            "sigmoid": (high - 1 / (1 + torch.exp((3 - 6 * times) / 0.9))) / (high - low),
        }
        curve = curves[r.schedule]
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    if r.zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod


def weights_of_timesteps(r: Any, alphas_cumprod: Tensor) -> Tensor | None:
    """How much an error of the output counts at each timestep, float32 [1000]; None: all the same."""
    snr = (alphas_cumprod / (1 - alphas_cumprod)).float().double()
    error_in_start = {"eps": 1 / snr, "x0": 1 + 0 * snr, "v": 1 - snr / (1 + snr)}[r.prediction]
    if r.weighting == "min_snr":
        return (snr.clamp(max=r.min_snr_gamma) * error_in_start).float()
    return (snr / (snr + 1) * error_in_start).float() if r.weighting == "p2" else None


def decays_after(r: Any, step: int) -> dict[str, float]:
    """The decay of each average after a step; that of a power function from γ = γ(σ_rel), found by bisection."""
    decays = {"ema": r.ema_decay, **{f"ema-{decay}": decay for decay in r.more_decays}}
    found = {name: min(decay, (1 + step) / (10 + step)) for name, decay in decays.items()}
    for width in r.widths:
        low, high = 0.0, 1e4  # σ_rel falls from 0.2887 as γ grows
        for _ in range(100):
            gamma = (low + high) / 2
            is_wider = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) > width
            low, high = (gamma, high) if is_wider else (low, gamma)
        found[f"power-{width}"] = (1 - 1 / (step + 1)) ** (low + 1)
    return found


def term_of_the_bound(
    r: Any, alphas_cumprod: Tensor, said: Tensor, v: Tensor, x: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """L_t of each image in bits per dimension, float32 [B], if the network said this; v is there if it is learned."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior = betas * (1 - before) / (1 - alphas_cumprod)

    def at(table: Tensor) -> Tensor:
        return table.float()[t].view(-1, 1, 1, 1)

    signal, sigma = at(alphas_cumprod.sqrt()), at((1 - alphas_cumprod).sqrt())
    low, high = at(posterior[1:][[0, *range(999)]].log()), at(betas.log())
    predicted = {"eps": (x_t - sigma * said) / signal, "x0": said, "v": signal * x_t - sigma * said}[r.prediction]
    if r.variance == "learned":
        weight = (v + 1) / 2
        spread = weight * high + (1 - weight) * low
    else:
        spread = low if r.variance == "fixed_small" else torch.where(t[:, None, None, None] == 0, low, high)
    of_start = betas * before.sqrt() / (1 - alphas_cumprod)
    of_x_t = (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod)
    mean, true_mean = (at(of_start) * image + at(of_x_t) * x_t for image in (predicted, x))
    change = low - spread
    divergence = 0.5 * (torch.expm1(change) - change + (true_mean - mean).square() * torch.exp(-spread))
    distance, half = (x - mean) * torch.exp(-0.5 * spread), torch.exp(-0.5 * spread) / 255
    upper, lower = (torch.special.log_ndtr(side - distance.abs()) for side in (half, -half))
    level = upper + torch.log(-torch.expm1(lower - upper))
    level = torch.where(x == -1, torch.special.log_ndtr(distance + half), level)
    level = torch.where(x == 1, torch.special.log_ndtr(half - distance), level)
    bits = [value.mean(dim=(1, 2, 3)) / math.log(2) for value in (divergence, -level)]
    return torch.where(t == 0, bits[1], bits[0])


def mean_loss(
    r: Any, table: Any, weight_of: Any, errors: Any, said: Any, v: Any, x_start: Any, x_t: Any, t: Any
) -> Any:
    """The mean loss of the images of a micro-batch, from the squared errors of the prediction and the variance."""
    if r.weighting == "vlb":
        return (1000 * term_of_the_bound(r, table, said, v, x_start, x_t, t)).mean()
    if r.variance == "learned":
        bound = 1000 * term_of_the_bound(r, table, said.detach(), v, x_start, x_t, t)
        weights_now = 1 if weight_of is None else weight_of[t]
        return (weights_now * errors.mean(dim=(1, 2, 3)) + r.vlb_weight * bound).mean()
    if weight_of is None:
        return errors.mean()
    return (weight_of[t] * errors.mean(dim=(1, 2, 3))).mean()


def train(images: Tensor, labels: Tensor, r: Any) -> tuple[Any, ...]:
    """Train on uint8 [N, C, H, W] images by a `Recipe`: the network, its averages, Adam, the scale, each step's log."""
    torch.manual_seed(derive_seed(r.seed, "weights"))
    layout = torch.channels_last if r.channels_last else torch.contiguous_format
    num_parts = 2 if r.variance == "learned" else 1
    outs = num_parts * images.shape[1]
    model = UNet(images.shape[1], r.channels, dropout=r.dropout, out_channels=outs, num_classes=r.classes)
    model = model.to(memory_format=layout)
    weights = list(model.parameters())
    averages = {name: [weight.detach().clone() for weight in weights] for name in decays_after(r, 0)}
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[r.optimizer]
    adam: Any = kind(weights, betas=r.betas, eps=r.eps, weight_decay=r.weight_decay, fused=r.fused)
    scale, in_a_row, log = r.first_scale, 0, []
    alphas_cumprod = noise_schedule(r)
    weight_of = weights_of_timesteps(r, alphas_cumprod)
    table, alphas_cumprod = alphas_cumprod, alphas_cumprod[:, None, None, None]
    groups = r.shards if r.bitwise else r.ranks  # a group adds its micro-batches up in turn, then pairs add their sums
    divisor, late_divisor = (r.shards, 1) if r.bitwise else (r.micro, r.ranks)  # of a loss, and of the sum of gradients
    for step in range(r.steps):
        pieces = zip(*(whole.chunk(groups * r.micro) for whole in global_batch(images, labels, r, step)), strict=True)
        sums: list[Any] = []
        loss = 0.0
        for number, (x_start, t, noise, classes) in enumerate(pieces):
            group, micro = divmod(number, r.micro)
            whose = (group,) if r.bitwise else (group * r.shards // groups, micro)
            torch.manual_seed(derive_seed(r.seed, "dropout", step, *whose))
            signal, sigma = alphas_cumprod[t].sqrt().float(), (1 - alphas_cumprod[t]).sqrt().float()
            x_t = signal * x_start + sigma * noise
            with torch.autocast("cpu", r.dtype, enabled=r.dtype != torch.float32):
                output = model(x_t.contiguous(memory_format=layout), t, classes if r.classes else None)
            target = {"eps": noise, "x0": x_start, "v": signal * noise - sigma * x_start}[r.prediction]
            said, v = output.float().chunk(2, 1) if num_parts == 2 else (output.float(), output)
            part = mean_loss(r, table, weight_of, (said - target).square(), said, v, x_start, x_t, t) / divisor
            (part * scale * (math.nan if step == r.nan_step else 1)).backward()
            loss += part.item() / late_divisor
            if micro == r.micro - 1:
                sums.append([weight.grad for weight in weights])
                adam.zero_grad()
        while len(sums) > 1:
            sums = [torch._foreach_add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        gradients = [total / (scale * late_divisor) for total in sums[0]]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        finite, clip = math.isfinite(norm), min(1.0, (r.grad_clip or math.inf) / (norm + 1e-6))
        half_turn = math.pi * min(1.0, (step - r.warmup_steps) / ((r.decay_steps or math.inf) - r.warmup_steps))
        lr = r.lr * (step + 1) / r.warmup_steps if step < r.warmup_steps else r.lr * 0.5 * (1 + math.cos(half_turn))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * clip if finite else None  # Adam leaves alone what has no gradient
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        for name, decay in decays_after(r, step).items():
            for average, weight in zip(averages[name], weights, strict=True):
                average.lerp_(weight.detach(), 1 - decay)
        log.append({"loss": loss, "lr": lr, "grad_norm": norm.item(), "skipped": int(not finite)})
        in_a_row = in_a_row + 1 if finite else 0
        if r.dtype == torch.float16:
            scale *= 0.5 if not finite else 2.0 if in_a_row % r.growth_interval == 0 else 1.0
    return model, averages, adam, scale, log
