"""All config keys: their types, defaults (the reference recipe), bounds, and whether a resume may change them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddpm_dist.config.declaration import key
from ddpm_dist.config.unet2d import UNet2DConfig

Auto = Literal["auto", "true", "false"]


@dataclass(frozen=True)
class RunConfig:
    """Which run this is, and the seed of everything in it that is random."""

    name: str = key("mnist", "name of the run, and of its directory below run.root", free=True)
    root: str = key("runs", "the folder of all run directories", free=True)
    seed: int = key(0, "fixes weights, data order, timesteps and noise", minimum=0)


@dataclass(frozen=True)
class DataConfig:
    """Which images, how many a step, and how they are read."""

    name: Literal["mnist", "fashion-mnist", "cifar10", "mnist5k", "folder"] = key("mnist", "which images")
    root: str = key("data", "where the images lie; only a download ever writes here", free=True)
    download: bool = key(True, "fetch the data set into data.root if it is not there", free=True)
    batch_size: int = key(128, "images per step over ALL ranks", minimum=1)
    image_size: int | None = key(None, "resize and centre-crop to this height and width (null: as they are)", minimum=4)
    channels: Literal["auto", "1", "3"] = key(
        "auto", "1: grey, 3: RGB (auto: as the images are; a folder is grey if each of its pictures is, at step 0)"
    )
    flip: bool = key(False, "mirror images left-right with probability 1/2")
    num_workers: int | None = key(
        None, "loader processes per rank (null: 0 for sets held in memory, 2 for folders)", minimum=0, free=True
    )


def loader_workers(data: DataConfig) -> int:
    """The number of processes per rank that read images: data.num_workers, or if that is null, a default.

    The default is 0 for data sets in memory, which are read faster without processes. For a folder it is 2: they decode
    pictures while the rank trains.
    """
    if data.num_workers is not None:
        return data.num_workers
    return 2 if data.name == "folder" else 0


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = key("unet", "the network; package.module:function builds one of your own", named=True)
    channels: int = key(64, "U-Net width at full resolution, a multiple of 8", minimum=8)
    time_embed_dim: int = key(128, "width of the time embedding, even", minimum=4)
    dropout: float = key(0.0, "dropout inside each residual block", minimum=0.0, below=1.0)
    class_labels: bool = key(
        False, "tell the network the class of each image; of a folder: the first sub-folder's name"
    )
    label_dropout: float = key(
        0.1, "share of the labels that are hidden from the network, which guidance needs", minimum=0.0, below=1.0
    )
    options: tuple[str, ...] = key((), "words for a network of your own, as it takes them, like [depth=4, heads=8]")


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, and what the network predicts."""

    num_timesteps: int = key(1000, "T, the number of noise levels", minimum=2)
    schedule: str = key(
        "linear", "how the noise grows with t; cosine suits small images, sigmoid larger ones", named=True
    )
    zero_terminal_snr: bool = key(
        False, "rescale the schedule so that the last timestep is pure noise; for the predictions x0 and v"
    )
    prediction: str = key(
        "eps", "what the network predicts; eps: the noise, x0: the image, v: noise minus image", named=True
    )
    variance: str = key(
        "fixed_large",
        "variance of the reverse steps; fixed_large: beta, fixed_small: that of the posterior, learned: in between",
        named=True,
    )
    beta_start: float = key(
        1e-4, "beta of the first (least noisy) timestep; cosine and sigmoid ignore it", above=0.0, below=1.0
    )
    beta_end: float = key(0.02, "beta of the last timestep; cosine and sigmoid ignore it", above=0.0, below=1.0)


@dataclass(frozen=True)
class LossConfig:
    """The training loss."""

    weighting: str = key(
        "simple",
        "how much each timestep counts; simple: all the same, min_snr and p2: less with little noise, vlb: as in the "
        "variational bound",
        named=True,
    )
    min_snr_gamma: float = key(5.0, "with min_snr an error of the image counts min(SNR, this)", above=0.0)
    vlb_weight: float = key(
        0.001, "with a learned variance, weight of the bound beside another weighting than vlb", above=0.0
    )
    timestep_sampler: str = key("uniform", "how the timestep of each image is drawn", named=True)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adam", "adamw"] = key("adam", "the optimizer; adamw is adam with optim.weight_decay")
    lr: float = key(2e-4, "peak learning rate, whatever the number of ranks", above=0.0)
    schedule: Literal["constant", "cosine"] = key("constant", "shape of the learning rate after the warm-up")
    warmup_steps: int = key(0, "steps of linear warm-up", minimum=0)
    decay_steps: int | None = key(None, "step at which the cosine reaches 0 (null: the last step)", minimum=1)
    grad_clip: float | None = key(None, "clip the global gradient norm to this (null: never)", above=0.0)
    beta1: float = key(0.9, "decay of the average of the gradients", minimum=0.0, below=1.0)
    beta2: float = key(0.999, "decay of the average of the squared gradients", minimum=0.0, below=1.0)
    eps: float = key(1e-8, "added to the root of that average before dividing by it", above=0.0)
    weight_decay: float = key(0.0, "each update of adamw shrinks all weights by this times the rate", minimum=0.0)
    fused: bool = key(True, "Adam in one kernel, without host synchronisation")


@dataclass(frozen=True)
class EmaConfig:
    """The moving averages of the weights."""

    decay: float = key(0.9999, "decay of the moving average of the weights; less at first", minimum=0.0, below=1.0)
    more: tuple[float, ...] = key(
        (), "further decays, each an average of its own: 0.999 is kept as ema-0.999", minimum=0.0, below=1.0
    )
    widths: tuple[float, ...] = key(
        (0.05, 0.1), "with checkpoint.ema_snapshots: widths of the power-function averages", above=0.0, below=0.28
    )


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from, in place of random weights. A resume does not read it again."""

    weights: str | None = key(
        None, "start from these weights: RUN_DIR, RUN_DIR@STEP, FILE.safetensors, or a folder of diffusers"
    )
    average: str = key("ema", "which weights of that RUN_DIR: ema, model, or another average that it keeps")
    run: str | None = key(None, "branch this run, RUN_DIR or RUN_DIR@STEP: go on at its step under this config")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how this machine computes."""

    epochs: int = key(20, "passes over the images", minimum=1, free=True)
    max_steps: int | None = key(None, "number of steps; beats train.epochs", minimum=1, free=True)
    micro_batch_size: int | None = key(
        None, "images per forward on one rank, to save memory (null: all of this rank's)", minimum=1, free=True
    )
    gradient_checkpointing: bool = key(
        False, "compute each block again for its gradient: less memory, a third more time, the same bits", free=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", "autocast type (auto: bf16 if fast)")
    matmul_precision: Literal["highest", "high", "medium"] = key(
        "highest", "float32 matrix products and convolutions; high and medium allow TF32 on CUDA"
    )
    compile: Auto = key("auto", "torch.compile (auto: off)")
    channels_last: Auto = key("auto", "NHWC memory format (auto: on for fp32 on CPUs)")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda if there is one", free=True)
    threads: int | None = key(None, "CPU threads per rank (null: its cores; 1 in bitwise mode)", minimum=1, free=True)
    check_drift_every: int | None = key(None, "steps between checks that ranks agree to the bit", minimum=1, free=True)
    max_skipped: int = key(50, "updates in a row with NaN or inf gradients that end the run (76)", minimum=1, free=True)
    log_every: int = key(10, "steps between lines of metrics.jsonl", minimum=1, free=True)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many stay."""

    every: int = key(500, "steps between checkpoints", minimum=1, free=True)
    every_seconds: float | None = key(None, "save also when this many seconds have passed", above=0.0, free=True)
    keep_last: int = key(3, "how many of the newest checkpoints stay", minimum=2, free=True)
    keep_every: int | None = key(None, "checkpoints at multiples of this step stay for ever", minimum=1, free=True)
    ema_snapshots: int | None = key(
        None, "steps between snapshots from which averages of any width are solved later (null: none)", minimum=1
    )


@dataclass(frozen=True)
class PreviewConfig:
    """The grids of sample images that are drawn during training."""

    every: int = key(1000, "steps between sample grids (0: only at the end)", minimum=0, free=True)
    num_images: int = key(64, "images in a grid (0: no grids)", minimum=0, free=True)
    sampler: str = key(
        "ddim", "dpm++ and heun need fewer steps; or diffusers:CLASS, a scheduler of diffusers", free=True, named=True
    )
    steps: int | None = key(None, "timesteps to visit (null: 50, or all with ddpm)", minimum=1, free=True)
    spacing: str | None = key(
        None, "which ones: even, leading, trailing, quadratic, log_snr (null: the sampler's own)", free=True
    )
    eta: float | None = key(None, "noise that ddim adds, 0 to 1 (null: 0)", minimum=0.0, free=True)
    variance: str | None = key(
        None, "of the noise that ddpm adds: fixed_large, fixed_small, learned (null: diffusion.variance)", free=True
    )
    clip: bool | None = key(None, "clip x_0 to [-1, 1] at each step (null: all samplers but ddpm do)", free=True)
    dynamic_threshold: float | None = key(
        None, "clip x_0 at this quantile of each image instead, like 0.995", above=0.0, free=True
    )
    guidance: float = key(
        1.0, "how clearly an image shows its class (0: unconditional, 1: as trained)", minimum=0.0, free=True
    )
    guidance_interval: tuple[int, ...] | None = key(
        None, "first and last timestep at which preview.guidance is used (null: at all)", free=True
    )
    seed: int = key(0, "seed of the grids; training draws none of its noise from it", minimum=0, free=True)
    weights: str = key("ema", "the average that is drawn from: ema, or one like ema-0.999 or power-0.05", free=True)


@dataclass(frozen=True)
class ElasticConfig:
    """What stays the same when the number of ranks changes."""

    mode: Literal["stream", "bitwise"] = key(
        "stream", "stream: any number of ranks sees the same data and noise; bitwise: it also computes the same bits"
    )
    shards: int = key(8, "logical shards of a batch; the number of ranks must divide it", minimum=1)
    on_mismatch: Literal["auto", "warn", "fail"] = key(
        "auto", "what to do if a resume would round differently (auto: warn in stream, fail in bitwise)", free=True
    )

    @property
    def fails_on_mismatch(self) -> bool:
        """Whether a resume that would round differently is refused."""
        return self.on_mismatch == "fail" or (self.on_mismatch == "auto" and self.mode == "bitwise")


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow is, if it is used."""

    enabled: bool = key(True, "mirror metrics.jsonl into MLflow", free=True)
    uri: str | None = key(None, "MLflow server (null: $MLFLOW_TRACKING_URI, else run.root/mlflow.db)", free=True)
    experiment: str = key("ddpm_dist", "MLflow experiment", free=True)


@dataclass(frozen=True)
class DistributedConfig:
    """How the ranks work together."""

    timeout_seconds: float = key(
        120.0, "a rank that is silent for this many seconds ends the job", above=0.0, below=1e6, free=True
    )


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on, one attribute for each section. It may be changed only by making another."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    unet2d: UNet2DConfig = field(default_factory=UNet2DConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def directory(self) -> Path:
        """The run directory, run.root/run.name."""
        return Path(self.run.root) / self.run.name

    def target(self, num_images: int) -> int:
        """The step at which the run is finished.

        Args:
            num_images: size of the data set.
        """
        return self.train.max_steps or self.train.epochs * (num_images // self.data.batch_size)
