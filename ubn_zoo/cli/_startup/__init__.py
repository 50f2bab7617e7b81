"""The folder that `ubn-zoo exec` puts on the path of child processes."""
