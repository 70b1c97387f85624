"""Image data on its way into an engine: decoding, preprocessing, batches."""
