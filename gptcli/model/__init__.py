"""The decoder and its key-value cache."""
