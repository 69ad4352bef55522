"""Low-dose tomography with missing angles: filtered backprojection and total variation, with photon noise.

python examples/tomography.py --angles 180 --photons 4096
"""

import argparse
import math

import skimage.data
import skimage.transform
import torch

import patchflow as pf
from patchflow.reconstruct import total_variation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--size", type=int, default=128, help="pixels along a side")
parser.add_argument("--angles", type=int, default=180, help="angles over half a turn")
parser.add_argument("--photons", type=float, default=4096, help="photons per bin without an object")
arguments = parser.parse_args()
torch.manual_seed(0)

size, count = arguments.size, arguments.angles
phantom = skimage.transform.resize(skimage.data.shepp_logan_phantom(), (size, size))
# Attenuations in 1/m on a field of view of 0.2 m: the phantom's 0.2 become those of water.
truth = 100 * torch.from_numpy(phantom).float()[None, None]

angles = (torch.arange(count, dtype=torch.float64) + 0.5) * math.pi / count
full = pf.ParallelBeam((size, size), angles, pixel=0.2 / size)
limited = full.select(slice(count // 10, count - count // 10))
print(limited.describe())

pictures = []
for name, projector in (("36 degrees missing", limited), ("full", full)):
    likelihood = pf.Likelihood(projector, pf.PoissonNoise(arguments.photons))
    y = likelihood.simulate(truth)
    fbp = projector.filtered_backprojection(y, window="hann")
    tv = total_variation.reconstruct(likelihood, y, fbp, weight=0.4).x
    figures = [f"{float(pf.psnr(x, truth, 100)):.2f} dB" for x in (fbp, tv)]
    print(f"{name}: filtered backprojection {figures[0]}, total variation {figures[1]}")
    pictures += [fbp, tv]
pf.write_image("tomography.png", torch.cat([*pictures, truth], -1).clamp(0, 60) / 60)
