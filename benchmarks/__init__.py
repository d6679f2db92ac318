"""How fast SAN is and how much memory it takes: `python -m benchmarks`."""

import os
import sys
from pathlib import Path

# Nothing here may wait for a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where `reference` is, which rebuilds the released tokenizer
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
