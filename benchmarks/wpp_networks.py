"""Super-resolution by networks without pairs (WPPNets, WPPFlows), beside the supervised network (ACNN) and bicubic.

Run: python benchmarks/wpp_networks.py --data DATA [--images material floor grass FS] [--seconds 600]
[--methods acnn wpp-net wpp-flow] [--operators accurate inaccurate estimated] [--json FILE].

Of each material there is an image to learn from, whose simulated measurement and patches the networks without pairs see
(the supervised one sees the image), and another to report. Scale 4, Gaussian blur of 16 x 16 pixels and standard
deviation 2, noise .01; figures inside of a border of 40 pixels. What the networks without pairs believe of it:

- accurate: as it is;
- inaccurate: standard deviation 2.5, as published; the measurements are those of 2;
- estimated: from one registered pair, the learning image and its measurement.

FS-registered is Fontainebleau sandstone measured twice, scale 2, whose operator is unknown: it is estimated from one
half of the pair, and the figures are those of the other half. Of WPPFlows the correlation of the standard deviation of
the samples with the absolute error of their mean is printed, too (aim: 0.3).
"""

import argparse
import json
import time
from pathlib import Path

import torch

import patchflow as pf
from patchflow.problems.blur import gaussian_kernel
from patchflow.problems.estimation import estimate_kernel
from patchflow.problems.resolution import LowResolution
from patchflow.reconstruct import acnn, wpp_flow

# What is learned from and what is reported, below material/.
IMAGES = {
    "material": ("img_learn_material.png", "img_test_material.png"),
    "floor": ("textures/floor_learn.png", "textures/floor_test.png"),
    "grass": ("textures/grass_learn.png", "textures/grass_test.png"),
    "FS": ("textures/FS_learn.png", "textures/FS_test.png"),
}
# Published, from the result images of the repository, border of 40 pixels (PSNR).
PUBLISHED = {
    ("material", "accurate"): 27.76,
    ("material", "inaccurate"): 27.48,
    ("FS", "accurate"): 31.17,
    ("FS-registered", "estimated"): 32.96,
    ("floor", "accurate"): 30.99,
    ("grass", "accurate"): 24.79,
}
NOISE, BORDER = 0.01, 40

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", required=True, type=Path)
parser.add_argument("--images", nargs="*", default=[*IMAGES, "FS-registered"])
parser.add_argument("--methods", nargs="*", default=["acnn", "wpp-net", "wpp-flow"])
parser.add_argument(
    "--operators", nargs="*", default=["accurate", "inaccurate", "estimated"], help="of WPPNets"
)
parser.add_argument("--seconds", type=float, default=600.0, help="training time of each network")
parser.add_argument(
    "--weight", type=float, help="of the prior of WPPNets; their default if not given"
)
parser.add_argument("--flow-weight", type=float, help="of the prior of WPPFlows; as well")
parser.add_argument("--patch", type=int, default=8)
parser.add_argument("--count", type=int, default=2000)
parser.add_argument("--scales", type=int, default=2)
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--samples", type=int, default=wpp_flow.SAMPLES)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)


def read(name):
    path = arguments.data / "material" / name
    if not path.exists():
        raise SystemExit(f"There is no {path}; see the README of the data folder.")
    return pf.read_image(path, grey=True)


def inside(x):
    return x[:, :, BORDER:-BORDER, BORDER:-BORDER]


def likelihood_of(kernel, scale, shape, boundary, anchor=(0, 0)):
    return pf.GaussianLikelihood(
        pf.Blur(kernel, shape, boundary, stride=scale, anchor=anchor), NOISE
    )


def believed(operator, learn, low):
    """The kernel of the operator that a network believes in, and its anchor."""
    if operator != "estimated":
        return gaussian_kernel(16, 2.0 if operator == "accurate" else 2.5), (0, 0)
    # The estimate wants each measured pixel in the middle of its cell; the operator shifts it by 6 pixels.
    found = estimate_kernel(learn.roll((-6, -6), (2, 3)), low, size=24)
    print(f"  estimated: gain {found.gain:.4f}, residual {found.residual:.4f}")
    anchor = (24 - 4) // 2 - 6
    return found.kernel, (anchor, anchor)


def trained(method, kernel, scale, learn, low):
    torch.manual_seed(arguments.seed)
    shared = {"scale": scale, "kernel_shape": tuple(kernel.shape), "noise": NOISE}
    limits = {"steps": 10**6, "seconds": arguments.seconds, "progress": True}
    if method == "acnn":
        model = pf.acnn(**shared, width=arguments.width).trained_for(kernel)
        degrade = LowResolution(kernel, scale, NOISE)
        record = pf.learn_pairs(model, [learn], pairs=degrade, crop=degrade.side(48), **limits)
        return model, record
    prior = pf.learn_wpp(
        [learn], size=arguments.patch, count=arguments.count, scales=arguments.scales
    )
    make, fit, weight = {
        "wpp-net": (pf.wpp_net, pf.learn_wpp_net, arguments.weight),
        "wpp-flow": (pf.wpp_flow, pf.learn_wpp_flow, arguments.flow_weight),
    }[method]
    model = make(**shared, width=arguments.width).trained_for(kernel)
    weighted = {} if weight is None else {"weight": weight}
    return model, fit(model, [low], prior=prior, **weighted, **limits)


def solve(method, likelihood, model, y):
    if method == "wpp-flow":
        torch.manual_seed(arguments.seed)
        return wpp_flow.reconstruct(likelihood, model, y, samples=arguments.samples)
    return acnn.reconstruct(likelihood, model, y)


def measure(name, method, operator, solution, truth):
    x = inside(solution.x.clamp(0, 1))
    row = {"psnr": float(pf.psnr(x, inside(truth))), "ssim": float(pf.ssim(x, inside(truth)))}
    if solution.std is not None:
        error = (inside(solution.x) - inside(truth)).abs().flatten()
        pairs = torch.stack([inside(solution.std).flatten(), error])
        row["std"] = float(pairs[0].mean())
        row["correlation"] = float(torch.corrcoef(pairs)[0, 1])
    if method == "wpp-net" and (name, operator) in PUBLISHED:
        row["published psnr"] = PUBLISHED[name, operator]
    return row


def run(name, method, operator, problem):
    kernel, scale, learn, low, y, truth, boundary = problem
    begun = time.perf_counter()
    model, record = trained(method, kernel, scale, learn, low)
    seconds = time.perf_counter() - begun
    likelihood = likelihood_of(kernel, scale, tuple(truth.shape[2:]), *boundary)
    solution = solve(method, likelihood, model, y)
    row = measure(name, method, operator, solution, truth)
    row |= {"steps": record.steps, "training seconds": seconds}
    print(name, method, operator, {key: round(value, 3) for key, value in row.items()}, flush=True)
    return {"image": name, "method": method, "operator": operator} | row


def simulated(name, operator):
    """Learning and reported image of a material, measured by the accurate operator."""
    learn, truth = (read(path) for path in IMAGES[name])
    torch.manual_seed(arguments.seed)
    true = gaussian_kernel(16, 2.0)
    lows = [
        likelihood_of(true, 4, tuple(x.shape[2:]), "periodic").simulate(x) for x in (learn, truth)
    ]
    start = likelihood_of(true, 4, tuple(truth.shape[2:]), "periodic").operator.initial(lows[1])
    print(f"{name}: bicubic {float(pf.psnr(inside(start), inside(truth))):.2f} dB", flush=True)
    kernel, anchor = believed(operator, learn, lows[0])
    return kernel, 4, learn, lows[0], lows[1], truth, ("periodic", anchor)


def registered():
    """The upper half of the pair to estimate from and to learn from, the lower half to report."""
    high, low = read("textures/hr_FS_registered.png"), read("textures/lr_FS_registered.png")
    found = estimate_kernel(high[:, :, :300], low[:, :, :150], size=15)
    print(f"FS-registered: gain {found.gain:.3f}, constant {found.bias:.3f}", flush=True)
    before = (15 - 2) // 2
    # The kernel reaches beyond the cells: the image of its windows has a frame, which the reported rows leave out.
    rows = low[:, :, 153:296, 3:296]
    top, left = 2 * 153 - before, 2 * 3 - before
    truth = high[:, :, top : top + 2 * 143 + 13, left : left + 2 * 293 + 13]
    reference = read("textures/ref_FS_registered.png")
    found_pair = (found.calibrated(low[:, :, :150]), found.calibrated(rows))
    return found.kernel, 2, reference, *found_pair, truth, ("valid",)


rows = []
for name in arguments.images:
    if name == "FS-registered":
        for method in arguments.methods:
            if method != "acnn":  # it would need the pair itself
                rows.append(run(name, method, "estimated", registered()))
        continue
    for method in arguments.methods:
        for operator in arguments.operators if method != "acnn" else ["accurate"]:
            rows.append(run(name, method, operator, simulated(name, operator)))
if arguments.json is not None:
    settings = {key: str(value) for key, value in vars(arguments).items()}
    arguments.json.write_text(json.dumps({"rows": rows, "settings": settings}, indent=1) + "\n")
