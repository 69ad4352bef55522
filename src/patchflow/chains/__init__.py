"""How to move: kernels and flows."""
