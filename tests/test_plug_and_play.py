"""Plug and play against closed forms and hand-made loops; what does not converge is refused."""

import numpy as np
import pytest
import torch

import patchflow as pf
from patchflow.networks.proximal_convolution import ConvolutionalProximalNetwork
from patchflow.networks.proximal_denoiser import ProximalDenoiser
from patchflow.numerics.averaged import relaxed, with_reference
from patchflow.reconstruct import plug_and_play

SIDE, STD = 10, 0.2


@pytest.fixture
def problem():
    operator = pf.downsample((SIDE, SIDE), 2, kernel_size=4)
    return pf.GaussianLikelihood(operator, STD), torch.rand(1, 1, SIDE // 2, SIDE // 2)


def shrink(x):
    """The proximal map of 3/2 the squared norm with the step 1/9: a firmly nonexpansive denoiser."""
    return 0.75 * x


def small_network(gamma=None, layers=2):
    network = ConvolutionalProximalNetwork(width=2, features=4, size=3, layers=layers)
    network.finish_()
    denoiser = ProximalDenoiser(network, level=0.1, gamma=gamma)
    return denoiser.requires_grad_(False)


@pytest.mark.parametrize("name", ["forward-backward", "admm"])
def test_fixed_points_of_shrinkage_are_those_of_tikhonov(problem, name):
    likelihood, y = problem
    operator, init = likelihood.operator, likelihood.operator.initial(problem[1])
    step = 0.015
    options = {"averagedness": 0.5, "step": step, "tolerance": 1e-12, "max_iterations": 4000}
    solve = pf.admm if name == "admm" else pf.forward_backward
    found = solve(likelihood, shrink, y, init, **options)
    # 0.75 = 1 / (1 + a step)
    a = (1 / 0.75 - 1) / step
    expected = operator.solve(operator.adjoint(y), STD**2 * a)
    assert found.converged
    assert torch.allclose(found.x, expected, atol=1e-9)
    assert all(
        after <= before for before, after in zip(found.history, found.history[1:], strict=False)
    )


def test_admm_is_the_published_loop(problem):
    likelihood, y = problem
    x, p, tau = likelihood.operator.initial(y), 0.0, 0.03
    gamma = 1 / tau
    for _ in range(7):
        z = shrink(x + p / gamma)
        p = p + gamma * (x - z)
        x = likelihood.prox(z - p / gamma, tau, y)
    init = likelihood.operator.initial(y)
    found = pf.admm(
        likelihood, shrink, y, init, averagedness=0.5, step=tau, max_iterations=7, tolerance=1e-15
    )
    assert torch.allclose(found.x, x)
    assert found.steps == len(found.history) == 7


@pytest.mark.parametrize("turn", [False, True])
def test_dpir_is_the_loop_made_by_hand(problem, turn):
    likelihood, y = problem
    tilt = torch.rand(SIDE, SIDE)
    seen = []

    def denoise(x, level):
        seen.append(level)
        return x / (1 + level * tilt)

    levels, weight = [0.3, 0.2, 0.1], 0.23
    matrix = likelihood.operator(torch.eye(SIDE**2).view(-1, 1, SIDE, SIDE)).flatten(1).mT
    z = init = likelihood.operator.initial(y)
    for k, level in enumerate(levels):
        rho = weight * STD**2 / level**2
        right = matrix.mT @ y.flatten() + rho * z.flatten()
        x = torch.linalg.solve(matrix.mT @ matrix + rho * torch.eye(SIDE**2), right)
        x = x.view(1, 1, SIDE, SIDE)
        way = k if turn else 0
        turned = torch.rot90(x.flip(-1) if way % 2 else x, way // 2, (2, 3))
        z = torch.rot90(turned / (1 + level * tilt), -(way // 2), (2, 3))
        z = z.flip(-1) if way % 2 else z
    found = plug_and_play.dpir(
        likelihood, denoise, y, init, levels=levels, weight=weight, turn=turn
    )
    assert torch.allclose(found.x, z, atol=1e-8)
    assert seen == levels
    assert found.steps == 3


def test_noise_levels_are_those_of_the_paper(problem):
    levels = plug_and_play.noise_levels(problem[0])
    assert len(levels) == 24
    assert levels == pytest.approx([STD] * 24)
    sharp = pf.GaussianLikelihood(pf.downsample((16, 16), 4), 0.001)
    levels = plug_and_play.noise_levels(sharp)
    assert (levels[0], levels[-1]) == (pytest.approx(49 / 255), pytest.approx(4 / 255))
    assert np.allclose(np.diff(np.log(levels)), np.log(4 / 49) / 23)
    plain = pf.GaussianLikelihood(pf.Identity((8, 8)), 0.001)
    assert plug_and_play.noise_levels(plain, 3)[-1] == pytest.approx(0.001)
    filling = pf.GaussianLikelihood(pf.Mask(torch.rand(8, 8) > 0.5), 0.01)
    levels = plug_and_play.noise_levels(filling)
    assert (len(levels), levels[0], levels[-1]) == (96, pytest.approx(0.1), pytest.approx(0.01))


@pytest.mark.parametrize("method", ["admm", "forward-backward"])
@pytest.mark.parametrize("gamma", [None, 1.9])
def test_steps_with_a_proximal_network_never_grow(problem, method, gamma):
    likelihood, y = problem
    denoiser = small_network(gamma, layers=1 if gamma else 2)
    init = likelihood.operator.initial(y)
    found = plug_and_play.reconstruct(
        likelihood, denoiser, y, init, weight=5.0, method=method, max_iterations=150
    )
    steps = np.array(found.history)
    assert (steps[1:] <= steps[:-1] * (1 + 1e-9) + 1e-14).all()
    assert steps[-1] < 0.5 * steps[0]


def test_both_methods_have_the_same_fixed_point(problem):
    likelihood, y = problem
    # A contraction, so that there is one fixed point: a proximal network, mixed with the start.
    init, network = likelihood.operator.initial(y), small_network()
    mixed, constant = with_reference(lambda x: network(x, 0.1), init, 1.0, contraction=0.8)
    denoise = relaxed(mixed, 0.5 / constant)
    options = {"averagedness": 0.5, "step": 0.02, "max_iterations": 3000, "tolerance": 1e-11}
    first = pf.forward_backward(likelihood, denoise, y, init, **options)
    second = pf.admm(likelihood, denoise, y, init, **options)
    assert first.converged
    assert second.converged
    assert torch.allclose(first.x, second.x, atol=1e-8)


def test_a_denoiser_that_is_not_averaged_is_found_out(problem):
    likelihood, y = problem
    init = likelihood.operator.initial(y)
    with pytest.raises(pf.NumericalError, match="which an averaged denoiser does not allow"):
        pf.forward_backward(likelihood, lambda x: 1.3 * x, y, init, averagedness=0.9)
    with pytest.raises(pf.NumericalError, match="The step grew from"):
        pf.admm(likelihood, lambda x: -1.5 * x, y, init, averagedness=0.5, step=0.02)


def test_the_callback_sees_every_step_and_interruption_keeps_the_image(problem):
    likelihood, y = problem
    init, seen = likelihood.operator.initial(y), []
    options = {"averagedness": 0.5, "step": 0.02, "max_iterations": 5, "tolerance": 1e-14}
    found = pf.admm(
        likelihood, shrink, y, init, callback=lambda k, x, r: seen.append((k, r)), **options
    )
    assert seen == list(enumerate(found.history))

    def stop(k, x, length):
        if k == 2:
            raise KeyboardInterrupt

    found = pf.admm(likelihood, shrink, y, init, callback=stop, **options)
    assert found.interrupted
    assert found.steps == 3


CONDITIONS = [
    ({"averagedness": 1.0}, {}, "averagedness 1.0 but forward-backward"),
    ({"averagedness": 0.9}, {"averagedness": 0.9}, "averagedness 0.9 but ADMM"),
    ({"step": 1.0}, {}, "below 2 / L ="),
    ({"lipschitz": 0.0}, {}, "Lipschitz constant is 0.0"),
    ({"tolerance": 0.0}, {"tolerance": 0.0}, "tolerance 0.0; both"),
    ({}, {"step": 0.0}, "step is 0.0"),
]


@pytest.mark.parametrize(("forward", "both", "message"), CONDITIONS)
def test_conditions_are_enforced(problem, forward, both, message):
    likelihood, y = problem
    init = likelihood.operator.initial(y)
    solve, options = pf.forward_backward, {"averagedness": 0.5} | forward
    if "ADMM" in message or (both and not forward):
        solve, options = pf.admm, {"averagedness": 0.5, "step": 0.01} | both
    with pytest.raises(pf.InputError, match=message):
        solve(likelihood, shrink, y, init, **options)


def test_more_is_refused_in_one_sentence(problem):
    likelihood, y = problem
    init = likelihood.operator.initial(y)
    for weight, levels in ((0.0, [0.1]), (1.0, []), (1.0, [0.1, 0.0])):
        with pytest.raises(pf.InputError, match="Got weight"):
            plug_and_play.dpir(likelihood, shrink, y, init, levels=levels, weight=weight)
    with pytest.raises(pf.InputError, match="number of steps is 0"):
        plug_and_play.noise_levels(likelihood, 0)
    with pytest.raises(pf.InputError, match="weight is 0"):
        plug_and_play.reconstruct(likelihood, small_network(), y, init, weight=0)
    with pytest.raises(pf.InputError, match="gamma 5 and the Lipschitz bound 4, with"):
        plug_and_play.reconstruct(likelihood, small_network(5), y, init)
    other = pf.Likelihood(likelihood.operator, pf.MixedNoise(0.1, 0.1))
    with pytest.raises(pf.InputError, match="gradient of a Likelihood is not known"):
        pf.forward_backward(other, shrink, y, init, averagedness=0.5)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda x: x[..., :-1], pf.InputError, r"made \(1, 1, 10, 9\) of an image"),
        (lambda x: x * float("nan"), pf.NumericalError, "values that are not finite"),
    ],
)
def test_bad_denoisers_are_refused(problem, broken, error, message):
    likelihood, y = problem
    init = likelihood.operator.initial(y)
    with pytest.raises(error, match=message):
        plug_and_play.dpir(likelihood, lambda x, std: broken(x), y, init, levels=[0.2, 0.1])
    with pytest.raises(error, match=message):
        pf.forward_backward(likelihood, broken, y, init, averagedness=0.5)
    with pytest.raises(error, match=message):
        pf.admm(likelihood, broken, y, init, averagedness=0.5, step=0.1)
