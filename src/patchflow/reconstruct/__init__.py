"""Methods of the literature that are more than an energy; one a file."""
