"""Whether posterior samples can be believed."""
