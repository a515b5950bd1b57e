"""Checkpoints: self-describing directories, written atomically. Never decided by a folder's name."""
