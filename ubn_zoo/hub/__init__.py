"""Files on the Hugging Face Hub: the manifest of checkpoints, and verified downloads."""
