"""The config: frozen dataclasses with the reference recipe as defaults, changed by a YAML file and dotted overrides.

Nothing here imports torch, so that a mistake is refused at once, without the seconds that torch takes to load.
"""

from ddpm_dist.config.averages import MAX_WIDTH, POWER, averages_of, width_of
from ddpm_dist.config.checks import check_world_size, cosine_end
from ddpm_dist.config.flat import from_flat, keys, named_parts, to_flat
from ddpm_dist.config.reading import load_config, nearest_key
from ddpm_dist.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ElasticConfig,
    OptimConfig,
    TrainConfig,
    loader_workers,
)
from ddpm_dist.config.writing import changes, describe_keys, to_yaml, unlike_the_defaults

__all__ = [
    "MAX_WIDTH",
    "POWER",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ElasticConfig",
    "OptimConfig",
    "TrainConfig",
    "averages_of",
    "changes",
    "check_world_size",
    "cosine_end",
    "describe_keys",
    "from_flat",
    "keys",
    "load_config",
    "loader_workers",
    "named_parts",
    "nearest_key",
    "to_flat",
    "to_yaml",
    "unlike_the_defaults",
    "width_of",
]
