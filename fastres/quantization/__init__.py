"""How a network comes to 8 bits: data, thresholds, the layers that stay out."""
