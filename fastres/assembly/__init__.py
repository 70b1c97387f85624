"""From an optimised graph to what an engine is made of."""
