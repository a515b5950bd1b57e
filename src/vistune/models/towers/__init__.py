"""Vision towers: what turns pixels into patch features."""
