"""Learn a prior from one half of a photograph, and super-resolve the other half from 1/16 of its pixels.

python examples/super_resolution.py --training 2500 --steps 600
"""

import argparse

import skimage.data
import torch

import patchflow as pf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--training", type=int, default=2500, help="training steps")
parser.add_argument("--steps", type=int, default=600, help="steps of the reconstruction")
arguments = parser.parse_args()
torch.manual_seed(0)

photograph = torch.from_numpy(skimage.data.brick()).float()[None, None] / 255
known, truth = photograph[..., :256], photograph[..., 256:]

# A density of 6 x 6 patches, and from it an energy of images.
prior = pf.patch_nr()
pf.learn_patches(prior, [known], steps=arguments.training, progress=True)

# The measurement: blurred, every fourth pixel kept, noisy.
likelihood = pf.GaussianLikelihood(pf.downsample((512, 256), stride=4), std=0.01)
y = likelihood.simulate(truth)

# The posterior energy; each step looks at one phase of the patch grid, a tiling of the image.
posterior = [likelihood + 0.1 * phase for phase in prior.phases()]
start = likelihood.operator.initial(y)
x = pf.minimize(posterior, start, condition=y, steps=arguments.steps, progress=True).x

for name, image in (("bicubic", start), ("patchNR", x)):
    quality = pf.psnr(pf.crop(image, 16), pf.crop(truth, 16)).item()
    print(f"{name}: {quality:.2f} dB")
pf.write_image("super_resolution.png", x)
