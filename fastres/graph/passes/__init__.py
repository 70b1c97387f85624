"""Rewrites Graph → Graph that keep the meaning; `pipeline.py` holds their order and why."""
