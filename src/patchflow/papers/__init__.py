"""One paper, one file: its numbers and choices."""
