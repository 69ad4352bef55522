"""Functions of tensors that know nothing of ours."""
