"""The posterior of the parameters of a simulator: learn it once for all measurements, then sample it for one.

Here frequency and damping of an oscillation, from 12 noisy values; see oscillation.py for the problem.

    python examples/posterior.py
"""

import argparse

import torch
from oscillation import likelihood, names, prior

from patchflow.io.atomic import write_bytes
from patchflow.io.posterior import Posterior
from patchflow.learn_posterior import learn_posterior
from patchflow.posterior_models import conditional_snf
from patchflow.posterior_report import corner_plot, summary_text
from patchflow.uncertainty.evidence import sample_posterior

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--training", type=int, default=400, help="training steps")
options = parser.parse_args()

torch.manual_seed(0)
truth = torch.tensor([[0.6, 0.4]])
y = likelihood.simulate(truth)

# Spline couplings conditional on the measurement, then Metropolis steps that leave the posterior invariant.
flow = conditional_snf(likelihood, prior, condition_dim=12, hidden=32)
learn_posterior(flow, likelihood, prior, batch=512, steps=options.training, progress=True)

draws = sample_posterior(flow, 10_000, y, correct="resample")
posterior = Posterior(
    draws.x,
    draws.log_weights,
    tuple(names),
    observation=y[0],
    log_evidence=draws.log_evidence,
    # The samples are drawn from four times as many weighted walks.
    ess=draws.ess * 40_000,
    k_hat=draws.k_hat,
)
print(f"true frequency {truth[0, 0]:g}, damping {truth[0, 1]:g}")
print(summary_text(posterior))
for warning in draws.warnings:
    print(warning)
write_bytes("posterior.png", corner_plot(posterior, truth[0]))
