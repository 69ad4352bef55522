"""ASTRA's projectors: in our conventions equal to ours, linear, differentiable, without leaks, and refused in time."""

import copy
import math
import sys

import numpy as np
import pytest
import torch

from patchflow.errors import InputError
from patchflow.problems.astra import (
    AstraProjector,
    astra_cone_beam,
    astra_fan_beam,
    astra_parallel_beam,
)
from patchflow.problems.fan_beam import FanBeam
from patchflow.problems.operator import adjoint_error
from patchflow.problems.tomography import ParallelBeam

astra = pytest.importorskip("astra")
needs_gpu = pytest.mark.skipif(not astra.use_cuda(), reason="ASTRA finds no GPU")


def turn(count, part=1.0, shift=0.3):
    return (torch.arange(count, dtype=torch.float64) + shift) * part * 2 * math.pi / count


def parallel(shape=(15, 12), *, bins=24, offset=0.3, pixel=0.7):
    spacing, angles = 0.9 * pixel, turn(9, 0.5)
    return ParallelBeam(shape, angles, bins, pixel=pixel, spacing=spacing, offset=offset * pixel)


def fan(shape=(15, 12), *, bins=24, offset=0.3, pixel=0.7):
    size = max(shape) * pixel
    return FanBeam(
        shape,
        turn(9),
        bins,
        source=2 * size,
        detector=size / 2,
        spacing=2.2 * size / bins,
        pixel=pixel,
        offset=offset * pixel,
    )


def bump(shape):
    """A smooth image without symmetries, of the same scene on every grid."""
    p0, p1 = (torch.linspace(-1, 1, n + 2)[1:-1] for n in shape)
    return torch.exp(-8 * ((p0[:, None] - 0.2) ** 2 + 2 * (p1 + 0.15) ** 2))[None, None]


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(40, 33), (20, 51)])
@pytest.mark.parametrize(("offset", "pixel"), [(0.0, 1.0), (0.4, 0.26 / 362)])
def test_linear_is_the_parallel_beam(shape, offset, pixel):
    ours = parallel(shape, bins=61, offset=offset, pixel=pixel)
    theirs = astra_parallel_beam(ours)
    x = torch.rand(1, 1, *shape, dtype=torch.float32)
    y = torch.rand(1, 1, *ours.range_shape, dtype=torch.float32)
    assert difference(theirs(x), ours(x)) < 1e-4
    assert difference(theirs.adjoint(y), ours.adjoint(y)) < 1e-4


@pytest.mark.parametrize(
    ("make", "wrap", "projector", "offset"),
    [
        (parallel, astra_parallel_beam, "strip", 0.3),
        (parallel, astra_parallel_beam, "line", 0.3),
        (fan, astra_fan_beam, "line_fanflat", 0.3),
        (fan, astra_fan_beam, "line_fanflat", 0.0),
        (fan, astra_fan_beam, "strip_fanflat", 0.0),
    ],
)
def test_other_discretisations_approach_ours(make, wrap, projector, offset):
    errors = []
    for size in (20, 40, 80):
        settings = {"bins": 3 * size, "offset": offset * size / 20, "pixel": 2 / size}
        ours = make((size, size * 3 // 4), **settings)
        x = bump(ours.domain_shape).float()
        errors.append(difference(wrap(ours, projector)(x), ours(x)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01


PROJECTORS = {
    "linear": lambda: astra_parallel_beam(parallel()),
    "strip": lambda: astra_parallel_beam(parallel(), "strip"),
    "line": lambda: astra_parallel_beam(parallel(), "line"),
    "line_fanflat": lambda: astra_fan_beam(fan()),
    "strip_fanflat": lambda: astra_fan_beam(fan(offset=0.0), "strip_fanflat"),
}
projectors = pytest.mark.parametrize("make", PROJECTORS.values(), ids=PROJECTORS)


@projectors
def test_adjoint(make):
    assert adjoint_error(make(), torch.float32) < 1e-6
    # In float64 it is no better, since ASTRA computes in float32.
    assert adjoint_error(make(), torch.float64) < 1e-6


@projectors
def test_gradient_is_the_adjoint(make):
    operator = make()
    x = torch.rand(2, 1, *operator.domain_shape, dtype=torch.float32, requires_grad=True)
    y = torch.rand(2, 1, *operator.range_shape, dtype=torch.float32)
    (found,) = torch.autograd.grad(0.5 * (operator(x) - y).square().sum(), x, create_graph=True)
    torch.testing.assert_close(found, operator.adjoint(operator(x) - y))
    # And the second derivative along x, which is that of a quadratic function.
    (second,) = torch.autograd.grad((found * x.detach()).sum(), x)
    torch.testing.assert_close(second, operator.adjoint(operator(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_are_images_one_by_one(dtype):
    operator = astra_parallel_beam(parallel())
    x = torch.rand(2, 3, 15, 12, dtype=dtype)
    y = operator(x)
    assert y.shape == (2, 3, 9, 24)
    assert y.dtype == dtype
    torch.testing.assert_close(y[1, 2], operator(x[1:, 2:])[0, 0], rtol=0, atol=0)
    turned = x.mT.contiguous().mT
    torch.testing.assert_close(operator(turned), y, rtol=0, atol=0)
    assert operator.adjoint(y).shape == x.shape
    assert operator(x[:0]).shape == (0, 3, 9, 24)


def test_start_image_and_solution():
    operator = astra_parallel_beam(parallel((20, 20), bins=35, offset=0.0, pixel=0.1))
    x = bump((20, 20))
    assert difference(operator.initial(operator(x)), x) < 0.1
    found = operator.solve(operator.adjoint(operator(x)), 1e-3)
    residual = operator.adjoint(operator(found - x)) + 1e-3 * found
    assert float(residual.norm()) < 1e-4 * float(operator.adjoint(operator(x)).norm())
    ours = parallel((20, 20), bins=35, offset=0.0, pixel=0.1)
    # Ours knows that the angles of its half turn leave no gap.
    shape = (30, 30)
    assert difference(operator.normal_spectrum(shape), ours.normal_spectrum(shape)) < 1e-4


def alive(capsys):
    """What exists in ASTRA, as it prints it."""
    capsys.readouterr()
    for module in (astra.data2d, astra.data3d, astra.projector, astra.algorithm):
        module.info()
    return capsys.readouterr().out


def test_nothing_is_left_in_astra(capsys, monkeypatch):
    before = alive(capsys)
    operator = astra_fan_beam(fan())
    x = torch.rand(3, 1, 15, 12, requires_grad=True)
    copied = copy.deepcopy(operator)
    copied(x).sum().backward()
    del copied
    operator.adjoint(operator(x))
    assert alive(capsys) == before

    def fail(*_):
        assert alive(capsys) != before
        raise RuntimeError("no memory")

    monkeypatch.setattr(astra.algorithm, "run", fail)
    for call in (lambda: operator(x), lambda: operator.adjoint(torch.rand(1, 1, 9, 24))):
        with pytest.raises(RuntimeError, match="no memory"):
            call()
    assert alive(capsys) == before


def test_geometries_are_copied():
    volume = astra.create_vol_geom(15, 12)
    geometry = astra.create_proj_geom("parallel", 1.0, 24, turn(9).numpy())
    operator = AstraProjector(volume, geometry)
    x = torch.rand(1, 1, 15, 12)
    expected = operator(x)
    geometry["ProjectionAngles"][:] = 0
    volume["GridRowCount"] = 3
    torch.testing.assert_close(operator(x), expected, rtol=0, atol=0)


def cone(shape=(5, 15, 12), detector_shape=(7, 24), pixel=0.5, **changes):
    settings = {"source": 15.0, "detector": 5.0, "spacing": 0.9, "pixel": pixel} | changes
    return astra_cone_beam(shape, turn(9), detector_shape, **settings)


def test_cone_beam_geometry(monkeypatch):
    # The geometry needs no GPU, only the projections do.
    monkeypatch.setattr(astra, "use_cuda", lambda: True)
    operator = cone()
    assert operator.domain_shape == (5, 15, 12)
    assert operator.range_shape == (7, 9, 24)
    option = operator.volume_geometry["option"]
    window = [option[f"Window{side}{axis}"] for axis in "XYZ" for side in ("Min", "Max")]
    np.testing.assert_allclose(window, [-3, 3, -3.75, 3.75, -1.25, 1.25])
    project = pytest.importorskip("astra.experimental").projectPoint
    p0, p1, z = 1.3, -0.8, 0.9
    for i, angle in enumerate(turn(9).tolist()):
        t = p0 * math.cos(angle) + p1 * math.sin(angle)
        s = -p0 * math.sin(angle) + p1 * math.cos(angle)
        scale = 20 / (15 + s) / 0.9
        # ASTRA's arrays have x and y along the last axis and the last but one.
        found = project(operator.projection_geometry, p1, p0, z, i)
        np.testing.assert_allclose(found, (t * scale + 11.5, z * scale + 3), atol=1e-6)
    with pytest.raises(InputError, match="not images"):
        operator.normal_spectrum((8, 8))


@needs_gpu
def test_cone_beam():
    slices = 9
    operator = astra_cone_beam(
        (slices, 40, 30), turn(20), (5, 61), source=60.0, detector=20.0, spacing=1.2
    )
    plane = FanBeam((40, 30), turn(20), 61, source=60.0, detector=20.0, spacing=1.2)
    x = bump((40, 30)).float()
    volume = x[:, :, None].expand(-1, -1, slices, -1, -1)
    y = operator(volume)
    assert y.shape == (1, 1, 5, 20, 61)
    assert difference(y[:, :, 2], plane(x)) < 1e-2
    # What is in the upper slices is in the upper rows.
    heights = operator(volume * torch.arange(slices).view(-1, 1, 1)).sum((0, 1, 3, 4))
    assert bool((heights.diff() > 0).all())
    # By rays there, by voxels back.
    assert adjoint_error(operator, torch.float32) < 1e-2


VOLUME, CUBE = astra.create_vol_geom(8, 8), astra.create_vol_geom(8, 8, 8)
BEAM = astra.create_proj_geom("parallel", 1.0, 12, turn(4).numpy())
REFUSED = {
    "no gpu": (lambda: cone(), "needs an ASTRA with CUDA and an NVIDIA GPU"),
    "no gpu 2d": (lambda: astra_fan_beam(fan(), "cuda"), "parallel or fan beam"),
    "source": (lambda: cone(source=1.0), "outside the image"),
    "unknown type": (lambda: AstraProjector(VOLUME, {"type": "spiral"}), "type 'spiral'"),
    "dimensions": (lambda: AstraProjector(CUBE, BEAM), "of one dimension"),
    "no volume": (lambda: AstraProjector({}, BEAM), "create_vol_geom"),
    "projector": (lambda: AstraProjector(VOLUME, BEAM, "linea"), "refuses the projector 'linea'"),
    "fan": (lambda: AstraProjector(VOLUME, BEAM, "line_fanflat"), "made for this geometry"),
    "strip": (lambda: astra_fan_beam(fan(), "strip_fanflat"), "'fanflat_vec'"),
    "incomplete": (lambda: AstraProjector(VOLUME, {"type": "parallel"}), "ProjectionAngles"),
    "high pixels": (
        lambda: AstraProjector(astra.create_vol_geom(8, 8, -4, 4, -8, 8), BEAM),
        "1 wide and 2 high",
    ),
    "image": (lambda: AstraProjector(VOLUME, BEAM)(torch.zeros(1, 1, 8, 9)), r"1, 1, 8, 9.*8, 8\)"),
    "sinogram": (
        lambda: AstraProjector(VOLUME, BEAM).adjoint(torch.zeros(1, 1, 12, 4)),
        r"\(batch, channels, 4, 12\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, monkeypatch):
    monkeypatch.setattr(astra, "use_cuda", lambda: False)
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call()


def test_without_astra(monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    for call in (lambda: astra_parallel_beam(parallel()), lambda: AstraProjector(VOLUME, BEAM)):
        with pytest.raises(InputError, match=r"pip install 'patchflow\[astra\]'"):
            call()
