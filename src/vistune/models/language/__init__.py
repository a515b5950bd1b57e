"""Language models: what composes with a vision tower, and how it is loaded."""
