"""Denoising of the BSD68 images at hand, sigma 25/255: a proximal network trained here, DnCNN with given weights.

Run: python benchmarks/pnn_denoising.py --data DATA [--seconds 1380] [--gamma 3]. The network learns from bsd_train400,
of which the first 8 images validate; DnCNN was trained by others. Prints the PSNR of each image, the measured Lipschitz
constants of the network (at most 1 by construction) and of the denoiser, and whether the aim of at most 0.7 dB below
DnCNN is reached. --model keeps the network, and takes it from there if it is there.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import patchflow as pf
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.averaged import measured_lipschitz

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--seconds", type=float, default=1380.0, help="training time")
parser.add_argument("--gamma", type=float, help="factor of the residual form; direct without it")
parser.add_argument("--width", type=int, default=8)
parser.add_argument("--features", type=int, default=32)
parser.add_argument("--size", type=int, default=5)
parser.add_argument("--layers", type=int, default=6)
parser.add_argument("--activation", choices=["relu", "elu", "shrink", "clip", "tanh"])
parser.add_argument("--lr", type=float, default=6e-3)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--images", type=int, default=9, help="number of test images")
parser.add_argument("--train-images", type=int, default=400)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--model", type=Path)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)
LEVEL = 25 / 255


def read(folder, count):
    paths = sorted((arguments.data / "noncommercial" / folder).glob("*.png"))[:count]
    if not paths:
        raise SystemExit(f"There are no images in {arguments.data}/noncommercial/{folder}.")
    return [pf.read_image(path, grey=True) for path in paths]


def trained():
    if arguments.model is not None and arguments.model.exists():
        return pf.load(arguments.model, ProximalDenoiser), None
    images = read("bsd_train400", arguments.train_images)
    torch.manual_seed(arguments.seed)
    denoiser = pf.pnn(
        level=LEVEL,
        gamma=arguments.gamma,
        width=arguments.width,
        features=arguments.features,
        size=arguments.size,
        layers=arguments.layers,
        activation=arguments.activation,
    )
    fitted = pf.learn_denoiser(
        denoiser,
        images[8:],
        images[:8],
        steps=10**6,
        seconds=arguments.seconds,
        lr=arguments.lr,
        batch=arguments.batch,
        crop=40,
        progress=True,
    )
    if arguments.model is not None:
        pf.save(arguments.model, denoiser, images=images, seed=arguments.seed)
    return denoiser, fitted


denoiser, fitted = trained()
dncnn = pf.load_dncnn(arguments.data / "weights" / "dncnn_25.safetensors", level=LEVEL)
rows = []
with torch.no_grad():
    for k, x in enumerate(read("bsd68", arguments.images)):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        y = x + LEVEL * noise
        row = {"noisy": float(pf.psnr(y, x))}
        for name, network in (("pnn", denoiser), ("dncnn", dncnn)):
            begun = time.perf_counter()
            row[name] = float(pf.psnr(network(y, LEVEL), x))
            row[f"{name} seconds"] = time.perf_counter() - begun
        rows.append(row)
        print(k, {key: round(value, 2) for key, value in row.items()}, flush=True)

# Where it is used: at noisy images, and at a clean one.
points = torch.cat([read("bsd68", 1)[0][:, :, :64, :64]] * 2)
points[0] += LEVEL * torch.randn(points[0].shape, generator=torch.Generator().manual_seed(0))
network = float(measured_lipschitz(denoiser.network, points - 0.5, iterations=30).max())
whole = float(measured_lipschitz(lambda z: denoiser(z, LEVEL), points, iterations=30).max())
means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
behind = means["dncnn"] - means["pnn"]
print(
    f"mean of {len(rows)} images: noisy {means['noisy']:.2f} dB, PNN {means['pnn']:.2f} dB, DnCNN "
    f"{means['dncnn']:.2f} dB; PNN is {behind:.2f} dB behind (aim: 0.7, "
    f"{'reached' if behind <= 0.7 else 'missed'})."
)
print(
    f"Lipschitz constant of the network: {network:.5f} measured (aim: at most 1.001, "
    f"{'reached' if network <= 1.001 else 'missed'}); of the denoiser: {whole:.4f} measured, "
    f"{denoiser.lipschitz:.3f} guaranteed."
)
if fitted is not None:
    print(f"{fitted.steps} steps in {fitted.seconds:.0f} s, validation {-fitted.best:.2f} dB.")
if arguments.json is not None:
    result = {"rows": rows, "means": means, "lipschitz": network, "denoiser": whole}
    result["settings"] = {key: str(value) for key, value in vars(arguments).items()}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
