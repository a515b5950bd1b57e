"""Models: towers, connectors, language models and what composes them."""
