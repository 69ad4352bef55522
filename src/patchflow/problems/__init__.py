"""What was measured: operators, noise, likelihoods."""
