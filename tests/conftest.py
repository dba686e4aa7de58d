"""Makes the harness importable from every test folder, and keeps the test process itself at one thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("MLFLOW_TRACKING_URI", None)
