"""What to believe: one prior a file."""
