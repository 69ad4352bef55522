"""Inverse problems with priors learned from the patches of a few images."""
