"""A conversation with a model in the terminal: turns, images, streaming. Not a server."""
