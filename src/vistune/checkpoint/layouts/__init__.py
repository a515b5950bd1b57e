"""Whole-model directories, one module per public layout, recognised by what is in them."""

from vistune.checkpoint.layouts.directory import describe_directory, load_directory

__all__ = ["describe_directory", "load_directory"]
