"""An operator of one's own: a forward map with its adjoint is all that a reconstruction needs.

Here a line camera that shakes: each row is shifted by a known number of pixels before a motion blur. The same
energy is minimised with total variation by a splitting method; a learned prior would take its place.

    python examples/own_operator.py
"""

import skimage.data
import torch
from torch import Tensor

import patchflow as pf
from patchflow.reconstruct import total_variation


class ShakenRows(pf.LinearOperator):
    """Shift row i to the right by ``shifts[i]`` pixels, periodically."""

    def __init__(self, shape: tuple[int, int], shifts: Tensor) -> None:
        super().__init__(shape, shape)
        columns = torch.arange(shape[1])
        self.register_buffer("there", (columns - shifts[:, None]) % shape[1])
        self.register_buffer("back", (columns + shifts[:, None]) % shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return x.gather(-1, self.there.expand_as(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return y.gather(-1, self.back.expand_as(y))


torch.manual_seed(0)
truth = torch.from_numpy(skimage.data.brick()).float()[None, None, :256, :256] / 255
motion = torch.full((1, 9), 1 / 9)
operator = pf.Blur(motion, (256, 256)) @ ShakenRows((256, 256), torch.randint(-3, 4, (256,)))

# The adjoint is right if <Ax, y> = <x, A'y>.
print(f"adjoint error: {pf.adjoint_error(operator):.1e}")

likelihood = pf.GaussianLikelihood(operator, std=0.01)
y = likelihood.simulate(truth)
start = operator.initial(y)
x = total_variation.reconstruct(likelihood, y, start, weight=10).x
for name, image in (("measurement", y), ("start", start), ("L2-TV", x)):
    print(f"{name}: {pf.psnr(image, truth).item():.2f} dB")
pf.write_image("own_operator.png", x)
