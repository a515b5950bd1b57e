"""Vistune gives a language model eyes."""

from vistune._version import __version__

__all__ = ["__version__"]
