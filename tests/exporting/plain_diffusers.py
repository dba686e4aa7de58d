"""Executes the code of a card in its folder, in a process that cannot import ddpm_dist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
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
sys.path.insert(0, os.getcwd())  # as for a person who starts python in this folder
import json, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
images = {}
for number, code in enumerate(json.loads(sys.argv[2])):
    names = {"torch": torch}
    exec(code, names)
    images[str(number)] = names["images"].clone()
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


def execute(folder: Path, codes: list[str], out: Path) -> list[Tensor]:
    """`images` after each piece of code."""
    argv = [sys.executable, "-I", "-c", PRELUDE, str(out), json.dumps(codes)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    return [found[str(number)] for number in range(len(codes))]


def difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float(torch.abs(left - right).max())
