"""Executes the code of cards in their folders, in a process that cannot import ddpm_dist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

PRELUDE = """
import os, sys
sys.modules["ddpm_dist"] = None  # however it is installed, it cannot be imported any more
try:
    import ddpm_dist
except ImportError:
    pass
else:
    raise SystemExit("ddpm_dist can be imported")
import json, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
images = {}
for number, (folder, code) in enumerate(json.loads(sys.argv[2])):
    os.chdir(folder)
    sys.path.insert(0, folder)  # as for a person who starts python in this folder
    names = {"torch": torch}
    exec(code, names)
    images[str(number)] = names["images"].clone()
    sys.path.remove(folder)
    sys.modules.pop("reference_unet", None)  # the next folder has one of its own
save_file(images, sys.argv[1])
"""


def code_of(folder: Path) -> list[str]:
    """The Python of a card. Before it draws, torch's generator is seeded; pipelines give tensors, and not pictures."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert blocks
    seeded = [
        re.sub(r"^(x = torch.randn|images = pipeline)", r"torch.manual_seed(0)\n\1", block, flags=re.M)
        for block in blocks
    ]
    assert all("manual_seed" in block for block in seeded)
    return [block.replace("pipeline(batch_size=4", "pipeline(output_type='pt', batch_size=4") for block in seeded]


def execute(codes: Sequence[tuple[Path, str]], out: Path) -> list[Tensor]:
    """What `images` is after each piece of code, which is executed in its folder.

    Args:
        codes: (folder, code) of each.
        out: a file for the images.
    """
    given = json.dumps([(str(folder), code) for folder, code in codes])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    argv = [sys.executable, "-I", "-c", PRELUDE, str(out), given]
    done = subprocess.run(argv, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    return [found[str(number)] for number in range(len(codes))]
