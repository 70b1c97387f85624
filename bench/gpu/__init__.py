"""What a GPU is asked: `python -m bench.gpu`, whose sections these are."""
