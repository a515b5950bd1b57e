"""Training: the loop, its step, loss, optimizer, schedule and hooks.

Importing this package imports nothing heavy; `vistune.train.loop.train` does the work.
"""
