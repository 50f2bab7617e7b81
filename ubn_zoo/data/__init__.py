"""Images: datasets in memory, readers, streams and the loaders that batch them."""
