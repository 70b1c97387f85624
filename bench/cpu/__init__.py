"""What a call takes on a CPU, and how that grows: `python -m bench.cpu.scaling` and others."""
