"""Lets the scripts of this folder find fastres in a checkout where it is not installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last: what is installed goes first
