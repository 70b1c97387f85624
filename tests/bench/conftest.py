"""The benchmarks are scripts: their folder comes first on the path, as when one is started."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "examples")]
