"""Line integrals against analytic transforms, against each other and against ASTRA; filtered backprojection."""

import math

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.numerics.ramp import angle_weights, filter_projections
from patchflow.problems.fan_beam import FanBeam
from patchflow.problems.operator import adjoint_error
from patchflow.problems.tomography import ParallelBeam


def half_turn(count, shift=0.5):
    return (torch.arange(count, dtype=torch.float64) + shift) * math.pi / count


ANGLES = {
    "midpoints": half_turn(20),
    "from zero": half_turn(12, 0.0),
    "odd": half_turn(7),
    "full turn": 2 * half_turn(16),
    "twice the same": half_turn(4, 0.0).repeat(2),
    "limited": half_turn(20)[2:17],
    "random": torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6,
    "one": torch.tensor([0.3], dtype=torch.float64),
}
angle_sets = pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)


@angle_sets
@pytest.mark.parametrize(
    ("shape", "offset", "bins"), [((15, 15), 0.0, 21), ((9, 14), 0.0, 24), ((16, 16), 0.4, 21)]
)
def test_engines_agree(angles, shape, offset, bins):
    torch.manual_seed(0)
    x = torch.rand(2, 3, *shape)
    settings = {"pixel": 0.7, "spacing": 0.8, "offset": offset}
    matrix = ParallelBeam(shape, angles, bins, **settings, engine="matrix")
    sampling = ParallelBeam(shape, angles, bins, **settings, engine="sampling")
    y = torch.rand(2, 3, len(angles), bins)
    torch.testing.assert_close(matrix(x), sampling(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(matrix.adjoint(y), sampling.adjoint(y), rtol=1e-10, atol=1e-10)
    for operator in (matrix, sampling):
        assert adjoint_error(operator, torch.float64) < 1e-12
        assert adjoint_error(operator, torch.float32) < 1e-6


def fan(shape=(15, 12), **settings):
    settings = {"source": 30.0, "detector": 10.0, "spacing": 1.3, "offset": 0.2} | settings
    return FanBeam(shape, 2 * half_turn(9, 0.1), 24, **settings)


def test_fan_beam_adjoint():
    assert adjoint_error(fan(), torch.float64) < 1e-12
    assert adjoint_error(fan(), torch.float32) < 1e-6


def test_derivatives():
    torch.manual_seed(0)
    for operator in (ParallelBeam((4, 4), half_turn(3)), fan((3, 4))):
        x = torch.rand(1, 1, *operator.domain_shape).requires_grad_()
        assert torch.autograd.gradcheck(operator, x)
        assert torch.autograd.gradcheck(operator.adjoint, operator(x).detach().requires_grad_())


def ellipse(size, centre, axes, tilt):
    """An ellipse on [-1, 1]^2, each pixel by 8 x 8 points."""
    fine = (torch.arange(size * 8) + 0.5) / (size * 4) - 1
    p0, p1 = fine[:, None] - centre[0], fine[None] - centre[1]
    u = (p0 * math.cos(tilt) + p1 * math.sin(tilt)) / axes[0]
    v = (p1 * math.cos(tilt) - p0 * math.sin(tilt)) / axes[1]
    inside = (u**2 + v**2 <= 1).to(torch.float64)
    return inside.view(size, 8, size, 8).mean((1, 3))[None, None]


def chords(normals, offsets, centre, axes, tilt):
    """The lengths of the chords that lines cut out of an ellipse."""
    angle = torch.atan2(normals[..., 1], normals[..., 0]) - tilt
    squared = (axes[0] * angle.cos()) ** 2 + (axes[1] * angle.sin()) ** 2
    t = offsets - normals[..., 0] * centre[0] - normals[..., 1] * centre[1]
    return 2 * axes[0] * axes[1] * (squared - t**2).clamp_min(0).sqrt() / squared


DISC = ((0.0, 0.0), (0.7, 0.7), 0.0)
# The three large ellipses of Shepp and Logan's head, and their attenuations.
HEAD = (
    (((0.0, 0.0), (0.92, 0.69), 0.0), 2.0),
    (((-0.0184, 0.0), (0.874, 0.6624), 0.0), -0.98),
    (((0.0, 0.22), (0.31, 0.11), 1.2566), -0.2),
)


@pytest.mark.parametrize("shapes", [((DISC, 1.0),), HEAD], ids=["disc", "head"])
@pytest.mark.parametrize("beam", ["parallel", "fan"])
def test_analytic_transforms(shapes, beam):
    errors = []
    for size in (32, 64, 128):
        pixel = 2 / size
        angles = 2 * half_turn(40, 0.2)
        if beam == "parallel":
            operator = ParallelBeam((size, size), angles, 65, pixel=pixel, spacing=2.8 / 65)
            t = (torch.arange(65) - 32) * 2.8 / 65
            normals = torch.stack((angles.cos(), angles.sin()), -1)[:, None].expand(-1, 65, -1)
            offsets = t.expand(40, -1)
        else:
            operator = FanBeam(
                (size, size), angles, 65, source=3, detector=1, spacing=0.06, pixel=pixel
            )
            # Independent of the operator's own code: from the positions of source and bins.
            u = (torch.arange(65) - 32) * 0.06
            normal = torch.stack((angles.cos(), angles.sin()), -1)[:, None]
            along = torch.stack((-angles.sin(), angles.cos()), -1)[:, None]
            source, target = -3 * along, along + u[:, None] * normal
            ray = (target - source) / (target - source).norm(dim=-1, keepdim=True)
            normals = torch.stack((ray[..., 1], -ray[..., 0]), -1)
            offsets = (normals * source).sum(-1)
        image = sum(value * ellipse(size, *shape) for shape, value in shapes)
        exact = sum(value * chords(normals, offsets, *shape) for shape, value in shapes)
        errors.append(float((operator(image)[0, 0] - exact).norm() / exact.norm()))
    assert errors[0] > 1.3 * errors[1] > 1.7 * errors[2]
    assert errors[2] < 0.02


def test_engine_follows_the_memory_limit():
    small = ParallelBeam((16, 16), half_turn(8))
    assert small.engine == "matrix"
    entries = sum(matrix._nnz() for matrix in small._matrices(torch.zeros(1)))
    assert entries <= small.matrix_bytes / 16 <= 1.1 * entries
    tight = ParallelBeam((16, 16), half_turn(8), memory_limit=small.matrix_bytes - 1)
    assert tight.engine == "sampling"
    assert "sampled" in tight.describe()
    with pytest.raises(InputError, match="more than the limit"):
        ParallelBeam((16, 16), half_turn(8), engine="matrix", memory_limit=100)


def test_symmetric_angles_share_a_matrix():
    regular = ParallelBeam((32, 32), half_turn(64))
    irregular = ParallelBeam((32, 32), half_turn(64) ** 1.01)
    assert irregular.matrix_bytes > 3.5 * regular.matrix_bytes
    rounded = ParallelBeam((32, 32), half_turn(64).float())
    assert rounded.matrix_bytes == regular.matrix_bytes


def test_selected_angles():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 12, 12)
    full = ParallelBeam((12, 12), half_turn(10), offset=0.3)
    part = full.select(slice(2, 7))
    torch.testing.assert_close(part(x), full(x)[:, :, 2:7])


@pytest.mark.parametrize("window", ["ram-lak", "shepp-logan", "cosine", "hamming", "hann"])
@pytest.mark.parametrize("turns", [1, 2])
def test_filtered_backprojection(window, turns):
    size = 96
    operator = ParallelBeam((size, size), turns * half_turn(180 * turns), pixel=2 / size)
    image = sum(value * ellipse(size, *shape) for shape, value in HEAD)
    found = operator.filtered_backprojection(operator(image), window=window)
    assert float((found - image).norm() / image.norm()) < 0.2
    # Away from edges the values themselves are right.
    assert abs(float(found[0, 0, 60, 48] - image[0, 0, 60, 48])) < 0.02
    torch.testing.assert_close(found.sum(), image.sum(), rtol=5e-3, atol=0)


def test_filters_are_ordered_and_cut():
    torch.manual_seed(0)
    noise = torch.randn(50, 129)
    names = ("ram-lak", "shepp-logan", "cosine", "hamming", "hann")
    energy = [float(filter_projections(noise, 1.0, window=name).norm()) for name in names]
    assert energy == sorted(energy, reverse=True)
    half = filter_projections(noise, 1.0, window="ram-lak", frequency_scaling=0.5)
    assert float(half.norm()) < 0.5 * energy[0]


def test_ramp_against_its_kernel():
    impulse = torch.zeros(1, 9)
    impulse[0, 4] = 1
    k = np.arange(-4, 5)
    expected = np.zeros(9)
    expected[k % 2 == 1] = -1 / (math.pi * k[k % 2 == 1]) ** 2
    expected[4] = 0.25
    found = filter_projections(impulse, 0.5, window="ram-lak") * 0.5
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-15)


def test_angle_weights():
    torch.testing.assert_close(angle_weights(half_turn(10)), torch.full((10,), math.pi / 10))
    torch.testing.assert_close(angle_weights(2 * half_turn(10)).sum(), torch.tensor(math.pi))
    missing = angle_weights(half_turn(10)[2:8])
    torch.testing.assert_close(missing, torch.full((6,), math.pi / 10))
    uneven = torch.tensor([0.0, 0.5, 1.5, 2.5])
    expected = torch.tensor([0.5 + math.pi - 2.5, 1.5, 2.0, 1 + math.pi - 2.5]) / 2
    torch.testing.assert_close(angle_weights(uneven), expected)


def test_limited_angle_start_image():
    size = 64
    operator = ParallelBeam((size, size), half_turn(100)[10:90], pixel=2 / size)
    image = ellipse(size, *DISC)
    assert float((operator.initial(operator(image)) - image).norm() / image.norm()) < 0.6


def test_fan_beam_start_image():
    image = ellipse(24, *DISC)
    operator = FanBeam((24, 24), 2 * half_turn(60), 49, source=50, detector=0, spacing=1.0)
    assert float((operator.initial(operator(image)) - image).norm() / image.norm()) < 0.2


def test_against_astra():
    astra = pytest.importorskip("astra")
    size, bins, angles = 40, 61, half_turn(30)
    torch.manual_seed(0)
    x = torch.rand(1, 1, size, size, dtype=torch.float32)
    spacing = 0.96
    operator = ParallelBeam((size, size), angles, bins, spacing=spacing)
    # Rows of ASTRA's images run along -y, columns along x; here axis 0 is x and axis 1 is y.
    volume = astra.create_vol_geom(size, size)
    geometry = astra.create_proj_geom("parallel", spacing, bins, angles.numpy())
    projector = astra.OpTomo(astra.create_projector("linear", geometry, volume))
    theirs = projector.FP(x[0, 0].T.flip(0).contiguous().numpy())
    found = operator(x)[0, 0].numpy()
    assert np.linalg.norm(found - theirs) / np.linalg.norm(theirs) < 1e-4


REFUSED = {
    "one pixel": (lambda: ParallelBeam((1, 5), half_turn(4)), "at least 2"),
    "pixel size": (lambda: ParallelBeam((5, 5), half_turn(4), pixel=0.0), "lengths positive"),
    "no angles": (lambda: ParallelBeam((5, 5), torch.zeros(0)), "at least one finite angle"),
    "nan": (lambda: ParallelBeam((5, 5), torch.tensor([math.nan])), "finite angle"),
    "image": (lambda: ParallelBeam((5, 5), half_turn(4))(torch.zeros(1, 1, 5, 6)), "5 x 6"),
    "sinogram": (
        lambda: ParallelBeam((5, 5), half_turn(4)).adjoint(torch.zeros(1, 1, 9, 4)),
        "axes are exchanged",
    ),
    "scaling": (
        lambda: filter_projections(torch.zeros(1, 8), 1.0, frequency_scaling=1.5),
        "frequency scaling is 1.5",
    ),
    "source": (lambda: fan(source=5.0), "outside the image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call()


def test_degrees_are_noticed():
    with pytest.warns(UserWarning, match="if they are degrees"):
        ParallelBeam((5, 5), torch.arange(0.0, 180.0, 30.0))
