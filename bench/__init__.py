"""What fastres costs and gives: programs run from the checkout's root, as `python -m bench.gpu`."""
