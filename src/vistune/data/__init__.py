"""From dataset files to packed rows of tokens and pixels. Never touches a device or a model."""
