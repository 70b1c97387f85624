"""Plan → launches: buffers, packed weights, recordings, time."""
