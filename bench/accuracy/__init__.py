"""What precisions cost: `python -m bench.accuracy`. Networks and digits are those of examples/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # scripts that import each other
