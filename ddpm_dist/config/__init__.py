"""The configuration: frozen dataclasses with the reference recipe as defaults, a YAML delta, dotted overrides.

No torch is imported here, so that a mistake is answered at once.
"""

from ddpm_dist.config.checks import check_world_size, cosine_end
from ddpm_dist.config.reading import load_config
from ddpm_dist.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ElasticConfig,
    OptimConfig,
    TrainConfig,
    changes,
    describe_keys,
    from_flat,
    keys,
    loader_workers,
    to_flat,
    to_yaml,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ElasticConfig",
    "OptimConfig",
    "TrainConfig",
    "changes",
    "check_world_size",
    "cosine_end",
    "describe_keys",
    "from_flat",
    "keys",
    "load_config",
    "loader_workers",
    "to_flat",
    "to_yaml",
]
