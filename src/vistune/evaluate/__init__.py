"""Scores of a model on held-out questions, with the controls and intervals that give them meaning.

It decides nothing about training; it reads a model and a test set and writes a directory.
"""
