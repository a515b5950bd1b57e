"""Self-describing checkpoint directories, written atomically; never read by a folder's name."""
