"""A problem file of the command line: frequency and damping of an oscillation, from 12 noisy values.

    python oscillation.py
    patchflow train conditional-snf --problem oscillation.py --steps 300 -o snf.safetensors
    patchflow sample y.csv --problem oscillation.py --model snf.safetensors -n 10000 -o posterior.nc
    patchflow calibrate --problem oscillation.py --model snf.safetensors -o calibration

The first line writes a simulated measurement, y.csv, and the true parameters, x.csv.
"""

import numpy as np
import torch
from torch import Tensor

import patchflow as pf
from patchflow.priors.uniform import Uniform

names = ["frequency", "damping"]
prior = Uniform(torch.tensor([0.2, 0.0]), torch.tensor([1.0, 1.0]))


def oscillate(x: Tensor) -> Tensor:
    """The deflection at 12 times of each row (frequency, damping): (batch, 2) to (batch, 12)."""
    frequency, damping = x[:, :1], x[:, 1:]
    times = torch.linspace(0.25, 3, 12).to(x)
    return torch.exp(-damping * times) * torch.cos(2 * torch.pi * frequency * times)


likelihood = pf.Likelihood(oscillate, pf.GaussianNoise(0.1))

if __name__ == "__main__":
    torch.manual_seed(0)
    truth = torch.tensor([[0.6, 0.4]])
    np.savetxt("x.csv", truth, delimiter=",", header=",".join(names), comments="")
    np.savetxt("y.csv", likelihood.simulate(truth), delimiter=",")
