"""Tiles that were measured, or chosen by estimate until they are: a file for each GPU."""
