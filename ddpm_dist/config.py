"""The configuration: frozen dataclasses with the reference recipe as defaults, a YAML delta, dotted overrides.

Precedence: defaults < file < command line. Values are read as text and converted by the declared type of
their key, so `1e-4` is a number and `no` is a boolean exactly where one is wanted. No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ddpm_dist.errors import ConfigError

Auto = Literal["auto", "true", "false"]


def key(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    free: bool = False,
) -> Any:
    """A config key.

    Args:
        default: the reference recipe's value.
        help: one line for `--help`.
        minimum, above, below: inclusive lower, exclusive lower and exclusive upper bound of a number.
        free: True if the key may change when a run is resumed. All others shape what is learned.
    """
    bounds = {"minimum": minimum, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "free": free, **bounds})


@dataclass(frozen=True)
class RunConfig:
    name: str = key("mnist", "name of the run, and of its directory below run.root", free=True)
    root: str = key("runs", "where run directories live", free=True)
    seed: int = key(0, "fixes weights, data order, timesteps and noise", minimum=0)


@dataclass(frozen=True)
class DataConfig:
    name: Literal["mnist", "fashion-mnist", "cifar10", "mnist5k", "folder"] = key("mnist", "which images")
    root: str = key("data", "where the images lie; only a download ever writes here", free=True)
    download: bool = key(True, "fetch the data set into data.root if it is not there", free=True)
    batch_size: int = key(128, "images per step over ALL ranks", minimum=1)
    image_size: int | None = key(None, "height and width (folder only: resize, then centre crop)", minimum=4)
    flip: bool = key(False, "mirror images left-right with probability 1/2")
    num_workers: int | None = key(
        None, "loader processes per rank (null: 0 for sets held in memory, 2 for folders)", minimum=0, free=True
    )


@dataclass(frozen=True)
class ModelConfig:
    channels: int = key(64, "U-Net width at full resolution, a multiple of 8", minimum=8)
    time_embed_dim: int = key(128, "width of the time embedding, even", minimum=4)
    dropout: float = key(0.0, "dropout inside each residual block", minimum=0.0, below=1.0)


@dataclass(frozen=True)
class DiffusionConfig:
    num_timesteps: int = key(1000, "T, the number of noise levels", minimum=2)
    beta_start: float = key(1e-4, "beta of the first (least noisy) timestep", above=0.0, below=1.0)
    beta_end: float = key(0.02, "beta of the last timestep", above=0.0, below=1.0)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = key(2e-4, "peak learning rate, whatever the number of ranks", above=0.0)
    schedule: Literal["constant", "cosine"] = key("constant", "shape of the learning rate after the warm-up")
    warmup_steps: int = key(0, "steps of linear warm-up", minimum=0)
    decay_steps: int | None = key(None, "step at which the cosine reaches 0 (null: the last step)", minimum=1)
    grad_clip: float | None = key(None, "clip the global gradient norm to this (null: never)", above=0.0)
    fused: bool = key(True, "Adam in one kernel, without host synchronisation")


@dataclass(frozen=True)
class EmaConfig:
    decay: float = key(0.9999, "decay of the weights' moving average, warmed up", minimum=0.0, below=1.0)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = key(20, "passes over the images", minimum=1, free=True)
    max_steps: int | None = key(None, "number of steps; beats train.epochs", minimum=1, free=True)
    micro_batch_size: int | None = key(
        None, "images per forward on one rank, to save memory (null: all of this rank's)", minimum=1, free=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", "autocast type (auto: bf16 where fast)")
    matmul_precision: Literal["highest", "high", "medium"] = key(
        "highest", "float32 matrix products and convolutions; high and medium allow TF32 on CUDA"
    )
    compile: Auto = key("auto", "torch.compile (auto: off)")
    channels_last: Auto = key("auto", "NHWC memory format (auto: on for fp32 on CPUs)")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda if there is one", free=True)
    threads: int | None = key(None, "CPU threads per rank (null: the cores this rank has)", minimum=1, free=True)
    log_every: int = key(10, "steps between lines of metrics.jsonl", minimum=1, free=True)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(500, "steps between checkpoints", minimum=1, free=True)
    keep_last: int = key(3, "how many of the newest checkpoints stay", minimum=2, free=True)


@dataclass(frozen=True)
class PreviewConfig:
    every: int = key(1000, "steps between sample grids (0: only at the end)", minimum=0, free=True)
    num_images: int = key(64, "images in a grid (0: no grids)", minimum=0, free=True)
    sampler: Literal["ddim", "ddpm"] = key("ddim", "ddim takes seconds, ddpm all timesteps", free=True)
    steps: int = key(50, "timesteps that ddim visits", minimum=1, free=True)
    seed: int = key(0, "seed of the grids; training noise is untouched by them", minimum=0, free=True)


@dataclass(frozen=True)
class ElasticConfig:
    mode: Literal["stream", "bitwise"] = key("stream", "stream: any number of ranks sees the same data and noise")
    shards: int = key(8, "logical shards of a batch; the number of ranks must divide it", minimum=1)


@dataclass(frozen=True)
class TrackingConfig:
    enabled: bool = key(True, "mirror metrics.jsonl into MLflow", free=True)
    uri: str | None = key(None, "MLflow server (null: $MLFLOW_TRACKING_URI, else run.root/mlflow.db)", free=True)
    experiment: str = key("ddpm_dist", "MLflow experiment", free=True)


@dataclass(frozen=True)
class DistributedConfig:
    timeout_seconds: float = key(300.0, "a rank silent for so long ends the job", above=0.0, free=True)


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on, resolved and validated."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
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


@dataclass(frozen=True)
class Key:
    """What is known of one dotted key."""

    name: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def free(self) -> bool:
        return bool(self.field.metadata["free"])

    @property
    def help(self) -> str:
        return str(self.field.metadata["help"])


@functools.cache
def keys() -> Mapping[str, Key]:
    """All dotted keys in the order of the file."""
    found = {}
    for section, section_type in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            name = f"{section}.{item.name}"
            found[name] = Key(name, hints[item.name], item)
    return types.MappingProxyType(found)


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Defaults < file < overrides, validated.

    Args:
        file: a YAML file that holds the differences from the defaults.
        overrides: `section.key=value`; the last one of a key wins.

    Raises:
        ConfigError: names the place, the key, the value and what would be valid.
    """
    values: dict[str, Any] = {}
    for place, name, text in [*(_read_file(Path(file)) if file else ()), *_read_overrides(overrides)]:
        values[name] = _convert(_known(name, place), text, place)
    config = from_flat(values)
    _check_together(config)
    return config


def from_flat(values: Mapping[str, Any]) -> Config:
    """Config from {dotted key: typed value}; keys left out keep their defaults."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, item = name.split(".")
        sections.setdefault(section, {})[item] = value
    section_types = typing.get_type_hints(Config)
    return Config(**{name: section_types[name](**given) for name, given in sections.items()})


def to_flat(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every key, in the order of the file."""
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in keys()}


def to_yaml(config: Config) -> str:
    """The resolved config; `load_config` of it gives an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=False)


def describe_keys() -> str:
    """One line a key: name, default, help. For `--help-config`."""
    lines = []
    for item in keys().values():
        default = "null" if item.field.default is None else item.field.default
        choices = "|".join(typing.get_args(item.type)) if typing.get_origin(item.type) is Literal else ""
        lines.append(f"  {item.name}={default}  {item.help}{f' [{choices}]' if choices else ''}")
    return "\n".join(lines)


def _read_file(path: Path) -> list[tuple[str, str, str]]:
    """(place, dotted key, text) of each value. Works on YAML's nodes: nothing is constructed, no tag obeyed."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    found: list[tuple[str, str, str]] = []
    if root is None:
        return found
    for place, section, node in _entries(path, root, ""):
        if section not in {item.name for item in dataclasses.fields(Config)}:
            raise ConfigError(f"{place}: unknown section {section!r}{_suggest(section)}")
        if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
            continue  # `data:` with every key below it commented out
        for inner_place, name, value in _entries(path, node, f"{section}."):
            if not isinstance(value, yaml.ScalarNode) or not value.tag.startswith("tag:yaml.org,2002:"):
                raise ConfigError(f"{inner_place}: {name}: expected one plain value")
            if value.tag.startswith("tag:yaml.org,2002:python"):
                raise ConfigError(f"{inner_place}: {name}: YAML tags are not obeyed; expected one plain value")
            found.append((inner_place, name, value.value))
    return found


def _entries(path: Path, node: yaml.Node, prefix: str) -> list[tuple[str, str, yaml.Node]]:
    """(place, prefixed key, node) of a mapping, each key once."""
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: {prefix or 'the file'}: expected a mapping like `optim: {{lr: 2e-4}}`")
    found: dict[str, tuple[str, str, yaml.Node]] = {}
    for name_node, value in node.value:
        place = f"{path}:{name_node.start_mark.line + 1}"
        if not isinstance(name_node, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        name = prefix + name_node.value
        if name in found:
            raise ConfigError(f"{place}: {name} is given twice (first at {found[name][0]})")
        found[name] = (place, name, value)
    return list(found.values())


def _read_overrides(overrides: Iterable[str]) -> list[tuple[str, str, str]]:
    found = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"command line: {text!r}: expected section.key=value, for example optim.lr=1e-4")
        found.append(("command line", name.strip(), value.strip()))
    return found


def _known(name: str, place: str) -> Key:
    if name not in keys():
        raise ConfigError(f"{place}: unknown key {name!r}{_suggest(name)}")
    return keys()[name]


def _suggest(name: str) -> str:
    """'; did you mean ...?' with the nearest key: by its last word first, else by its whole name."""
    last = name.rpartition(".")[2]
    same_word = [known for known in keys() if known.rpartition(".")[2] == last or known == name]
    near = difflib.get_close_matches(name, same_word or keys(), n=1, cutoff=0.0 if same_word else 0.5)
    if not near:
        by_word = {known.rpartition(".")[2]: known for known in keys()}
        near = [by_word[word] for word in difflib.get_close_matches(last, by_word, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else "; `--help-config` lists all keys"


_BOOLEANS = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def _convert(item: Key, text: str, place: str) -> Any:
    """The text as the key's declared type, within its bounds."""
    wanted, optional = item.type, False
    if isinstance(wanted, types.UnionType):
        optional = True
        (wanted,) = (arg for arg in typing.get_args(wanted) if arg is not type(None))
    if optional and text.lower() in ("null", "none", "~", ""):
        return None
    or_null = " or null" if optional else ""

    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{place}: {item.name}={text}: expected {expected}{or_null}")

    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        # `no` and `yes` are how YAML's users write booleans, so `auto | true | false` takes them too.
        text = str(_BOOLEANS.get(text.lower(), text)).lower() if "true" in choices else text
        if text not in choices:
            raise refuse(f"one of {', '.join(choices)}")
        return text
    if wanted is bool:
        if text.lower() not in _BOOLEANS:
            raise refuse("true or false")
        return _BOOLEANS[text.lower()]
    if wanted is str:
        if not text:
            raise refuse("some text")
        return text
    name = {int: "a whole number", float: "a number"}[wanted]
    try:
        value = wanted(text)
    except ValueError:
        raise refuse(name) from None
    bounds = item.field.metadata
    if value != value or value in (float("inf"), float("-inf")):
        raise refuse("a finite number")
    for passes, words in (
        (bounds["minimum"] is None or value >= bounds["minimum"], f"of at least {bounds['minimum']}"),
        (bounds["above"] is None or value > bounds["above"], f"above {bounds['above']}"),
        (bounds["below"] is None or value < bounds["below"], f"below {bounds['below']}"),
    ):
        if not passes:
            raise refuse(f"{name} {words}")
    return value


def _check_together(config: Config) -> None:
    """Rules that bind more than one key, or a text's form.

    Raises:
        ConfigError: names the keys and what would be valid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]{0,199}", config.run.name):
        raise ConfigError(
            f"run.name={config.run.name}: expected one directory name of letters, digits and _.=,+- "
            "that starts with a letter, a digit or _ (no /, no ..)"
        )
    data, shards = config.data, config.elastic.shards
    if data.batch_size % shards:
        near = sorted({max(1, data.batch_size // shards) * shards, (data.batch_size // shards + 1) * shards})
        raise ConfigError(
            f"data.batch_size={data.batch_size}: must be a multiple of elastic.shards={shards}; "
            f"valid nearby: {', '.join(map(str, near))}"
        )
    if config.elastic.mode == "bitwise":
        raise ConfigError("elastic.mode=bitwise: not in this version; valid: stream")
    if data.name != "folder" and data.image_size is not None:
        raise ConfigError(f"data.image_size={data.image_size}: only for data.name=folder; valid here: null")
    if data.name == "folder" and (data.image_size is None or data.image_size % 4):
        raise ConfigError(f"data.image_size={data.image_size}: data.name=folder needs a multiple of 4, like 64")
    if config.model.channels % 8:
        raise ConfigError(f"model.channels={config.model.channels}: must be a multiple of 8 (GroupNorm has 8 groups)")
    if config.model.time_embed_dim % 2:
        raise ConfigError(f"model.time_embed_dim={config.model.time_embed_dim}: must be even")
    if config.diffusion.beta_start > config.diffusion.beta_end:
        raise ConfigError("diffusion.beta_start: must not be above diffusion.beta_end")
    if config.preview.steps > config.diffusion.num_timesteps:
        raise ConfigError(
            f"preview.steps={config.preview.steps}: at most diffusion.num_timesteps={config.diffusion.num_timesteps}"
        )
    decay = config.optim.decay_steps or config.train.max_steps
    if config.optim.schedule == "cosine" and decay is not None and decay <= config.optim.warmup_steps:
        raise ConfigError(f"optim.warmup_steps={config.optim.warmup_steps}: must be below the last decay step, {decay}")


def check_world_size(config: Config, world_size: int) -> None:
    """W ranks must share the logical shards evenly, and micro-batches must share a rank's images evenly.

    Raises:
        ConfigError: lists the world sizes or micro-batch sizes that would be valid.
    """
    shards = config.elastic.shards
    if shards % world_size:
        valid = [str(n) for n in range(1, shards + 1) if shards % n == 0]
        raise ConfigError(
            f"{world_size} ranks cannot share elastic.shards={shards} evenly; valid numbers of ranks: "
            f"{', '.join(valid)} (set elastic.shards to the largest number you plan, before the run starts)"
        )
    per_rank, micro = config.data.batch_size // world_size, config.train.micro_batch_size
    if micro is not None and micro < per_rank and per_rank % micro:
        valid = [str(n) for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise ConfigError(
            f"train.micro_batch_size={micro}: must divide the {per_rank} images of a rank "
            f"(data.batch_size={config.data.batch_size} over {world_size}); valid: {', '.join(valid)}"
        )


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Differences between a run's config and the one it is resumed with, as `key: old -> new`.

    Returns:
        (refused, free): those that shape what is learned, and those that may change.
    """
    before, after = to_flat(old), to_flat(new)
    refused: list[str] = []
    free: list[str] = []
    for name, item in keys().items():
        if before[name] != after[name]:
            (free if item.free else refused).append(f"{name}: {before[name]} -> {after[name]}")
    return refused, free
