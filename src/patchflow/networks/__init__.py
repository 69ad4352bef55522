"""Image networks, one architecture a file."""
