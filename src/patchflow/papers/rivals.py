"""What the methods of the tables learn from a few images, once per material, kept in files if asked."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from patchflow.fit import Fit
from patchflow.learn import learn_patches
from patchflow.learn_denoiser import Spread, learn_denoiser
from patchflow.learn_gan import learn_gan
from patchflow.learn_mixture import learn_epll, learn_student_t
from patchflow.learn_pairs import learn_pairs
from patchflow.learn_reference import learn_wpp
from patchflow.learn_single_image import learn_single_image
from patchflow.learn_wpp_flow import learn_wpp_flow
from patchflow.learn_wpp_net import learn_wpp_net
from patchflow.models import (
    acnn,
    drunet,
    patch_gan,
    patch_nr,
    patch_vae,
    pnn,
    single_image,
    wpp_flow,
    wpp_net,
)
from patchflow.networks.denoiser import Denoiser
from patchflow.papers import prost2021_local_ar as prost
from patchflow.papers.library import Lesson, Teacher, check_finished
from patchflow.problems.blur import Blur
from patchflow.problems.likelihood import GaussianLikelihood
from patchflow.problems.operator import LinearOperator
from patchflow.problems.resolution import LowResolution, lowers_resolution
from patchflow.problems.sampling import Mask
from patchflow.problems.signature import signature
from patchflow.resolution_models import SuperResolver

# Smoothing of wpp-sinkhorn, in squared units of the image; published (survey): 1e-4 with 10,000 reference patches.
# Highest PSNR on the validation image of super-resolution among 0, 1e-3, 1e-2.
EPSILON = 1e-2
SHORT_SECONDS = 90.0
# Share of spoilt patches among the negatives of the critic of patch-gan. Highest PSNR on a part of the validation image
# of super-resolution, after 60 s on a loaded core (200 steps): 27.97 dB with the weight 20; 27.86 dB without them.
SPOILT = 0.5
# Of patchNR. Highest PSNR on a part of the validation image of super-resolution, after 240 to 300 s on one core: 6 x 6
# without smoothing 28.22 dB, with .01 28.21, with .02 28.27; 8 x 8 with .02 28.31.
SIZE, SMOOTHING = 8, 0.02

# Side length of the windows of single-image.
WINDOW = 128
# Side length of the crops that networks of super-resolution learn from.
CROP = 48
# Noise level of the network of pnp-pnn; weights are tuned for it.
PNN_LEVEL = 10 / 255


def _epll(lesson: Lesson) -> nn.Module:
    prior, record = learn_epll(lesson.images, progress=True)
    check_finished(record)
    return prior


def _local_ar(lesson: Lesson) -> nn.Module:
    prior, record = prost.learn(prost.SMALL, lesson.images, progress=True)
    check_finished(record)
    return prior


def _student_t(lesson: Lesson) -> nn.Module:
    prior, record = learn_student_t(lesson.images, progress=True)
    check_finished(record)
    return prior


def _patch_gan(lesson: Lesson) -> nn.Module:
    prior = patch_gan()
    record = learn_gan(
        prior, lesson.images, spoilt=SPOILT, steps=10**6, seconds=SHORT_SECONDS, progress=True
    )
    check_finished(record)
    return prior


def _patch_vae(lesson: Lesson) -> nn.Module:
    prior = patch_vae()
    record = learn_patches(
        prior,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=SHORT_SECONDS,
        progress=True,
    )
    check_finished(record)
    return prior


def _patchnr(lesson: Lesson, seconds: float) -> nn.Module:
    return learn_patchnr(lesson._replace(seconds=seconds))


def learn_patchnr(
    lesson: Lesson, *, size: int = SIZE, smoothing: float = SMOOTHING, padding: int = 0
) -> nn.Module:
    """A patchNR, learned for the time of the lesson."""
    prior = patch_nr(size=size, smoothing=smoothing, padding=padding)
    record = learn_patches(
        prior,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return prior


def _denoiser(lesson: Lesson, denoiser: Denoiser, spread: Spread = "uniform") -> nn.Module:
    """A denoiser, learned for the time of the lesson."""
    record = learn_denoiser(
        denoiser,
        lesson.images,
        lesson.validation,
        steps=10**6,
        seconds=lesson.seconds,
        spread=spread,
        progress=True,
    )
    check_finished(record)
    return denoiser


def _acnn(lesson: Lesson) -> nn.Module:
    """The supervised network of the table of super-resolution, learned for the time of the lesson."""
    operator, std = _resolution(lesson)
    degrade = LowResolution(operator.kernel, operator.stride, std)
    model = acnn(scale=operator.stride, noise=std).trained_for(operator.kernel)
    record = learn_pairs(
        model,
        lesson.images,
        lesson.validation,
        pairs=degrade,
        crop=degrade.side(CROP),
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return model


def _unpaired(
    lesson: Lesson, make: Callable[..., SuperResolver], learn: Callable[..., Fit]
) -> nn.Module:
    """A model of the same problem that learns without pairs: measurements of the lower halves, patches of the upper."""
    operator, std = _resolution(lesson)
    degrade = LowResolution(operator.kernel, operator.stride, std)
    model = make(scale=operator.stride, noise=std).trained_for(operator.kernel)
    record = learn(
        model,
        [degrade(image[:, :, image.shape[2] // 2 :])[1] for image in lesson.images],
        lesson.validation,
        prior=learn_wpp(
            [image[:, :, : image.shape[2] // 2] for image in lesson.images], scales=2, dihedral=True
        ),
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return model


def _resolution(lesson: Lesson) -> tuple[Blur, float]:
    """The operator of super-resolution and the noise, for the training image."""
    height, width = lesson.images[0].shape[2:]
    assert lesson.law is not None
    likelihood = lesson.law((height, width))
    assert isinstance(likelihood, GaussianLikelihood)
    assert lowers_resolution(likelihood.operator)
    return likelihood.operator, likelihood.std


def _single_image(lesson: Lesson) -> nn.Module:
    """A network for the problem of a table, learned for the time of the lesson."""
    assert lesson.law is not None
    height, width = lesson.images[0].shape[2:]
    whole = lesson.law((height, width)).operator
    assert isinstance(whole, LinearOperator)
    masked = isinstance(whole, Mask)
    shape = (height, width) if masked else (WINDOW, WINDOW)
    model = single_image(
        measurement=signature(lesson.law(shape)),
        cell=whole.stride if lowers_resolution(whole) else 2,
        # Chosen on the validation image, among four to sixteen blocks, one or two members, widths 64 and 96.
        blocks=8,
        members=2,
    )
    record = learn_single_image(
        model,
        lesson.images,
        lesson.validation,
        problem=lesson.law,
        window=shape,
        wrap=masked,
        batch=1 if masked else 4,
        steps=10**6,
        seconds=lesson.seconds,
        progress=True,
    )
    check_finished(record)
    return model


TEACHERS: dict[str, Teacher] = {
    "epll": _epll,
    "wpp": lambda lesson: learn_wpp(lesson.images, scales=2),
    "wpp-sinkhorn": lambda lesson: learn_wpp(lesson.images, scales=2, epsilon=EPSILON),
    "local-ar": _local_ar,
    "patch-gan": _patch_gan,
    "student-t": _student_t,
    "patch-vae": _patch_vae,
    "patchnr-90s": lambda lesson: _patchnr(lesson, SHORT_SECONDS),
    "patchnr": learn_patchnr,
    "dpir": lambda lesson: _denoiser(lesson, drunet()),
    "pnp-pnn": lambda lesson: _denoiser(lesson, pnn(level=PNN_LEVEL)),
    "single-image-denoiser": lambda lesson: _denoiser(
        lesson, drunet(low=0.003, high=0.5), "log-uniform"
    ),
    "single-image": _single_image,
    "acnn": _acnn,
    "wpp-net": lambda lesson: _unpaired(lesson, wpp_net, learn_wpp_net),
    "wpp-flow": lambda lesson: _unpaired(lesson, wpp_flow, learn_wpp_flow),
}
