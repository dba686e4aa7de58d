"""The table of formats in which a trained run can be exported.

To add a format: write a function with the arguments of `Write` in a file of its own, and enter it in FORMATS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ddpm_dist.errors import ConfigError
from ddpm_dist.exporting.diffusers_folder import write_diffusers_folder
from ddpm_dist.exporting.shareable import shareable_config
from ddpm_dist.loading import LoadedRun
from ddpm_dist.run.weights_file import WeightsFile, write_weights_file


class Write(Protocol):
    """Writes one format."""

    def __call__(self, run: LoadedRun, out: Path, license_id: str | None) -> None:
        """Write the run to `out`, whole or not at all.

        Args:
            run: what is exported.
            out: where nothing is yet, or an empty folder; the folder in which it is to lie exists.
            license_id: the licence that the user gives the weights, like `mit`; None for none.

        Raises:
            ConfigError: this run cannot be written in this format, or a package is missing.
            OSError: it cannot be written there.
        """


def write_safetensors(run: LoadedRun, out: Path, license_id: str | None) -> None:
    """Write one file that `load_run` and init.weights read back."""
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"--out {out}: expected the name of a file that ends with .safetensors, like {out}.safetensors"
        )
    if license_id is not None:
        raise ConfigError("--license: stands in the card that --to diffusers writes; --to safetensors writes none")
    state, config = run.network.state_dict(), shareable_config(run.config)
    write_weights_file(out, WeightsFile(state, config, run.contract, run.step, run.weights, run.source_sha256))


FORMATS: dict[str, Write] = {"safetensors": write_safetensors, "diffusers": write_diffusers_folder}
"""The formats by the name that --to gives them."""
