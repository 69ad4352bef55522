"""Fill in pixels that were never measured: the prior is learned from what was.

python examples/inpainting.py --training 2500 --steps 600
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

# Lines of 4 pixels are missing, as from dead detector rows.
mask = torch.ones(512, 256, dtype=torch.bool)
mask[8::16] = mask[9::16] = mask[10::16] = mask[11::16] = False
likelihood = pf.GaussianLikelihood(pf.Mask(mask), std=0.02)
y = likelihood.simulate(truth)

prior = pf.patch_nr()
pf.learn_patches(prior, [known], steps=arguments.training, progress=True)
posterior = [likelihood + 0.3 * phase for phase in prior.phases()]
start = likelihood.operator.initial(y)
x = pf.minimize(posterior, start, condition=y, steps=arguments.steps, progress=True).x

for name, image in (("harmonic filling", start), ("patchNR", x)):
    print(f"{name}: {pf.psnr(image, truth).item():.2f} dB")
pf.write_image("inpainting.png", x)
