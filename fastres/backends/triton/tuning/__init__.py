"""Which tile is fastest: measured where it can be, else by estimate."""
