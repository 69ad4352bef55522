"""Student-t mixtures on patches: against scipy, EM that never loses, PALM that finds what EM finds."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch

import patchflow as pf
from patchflow import models
from patchflow.cli import main
from patchflow.errors import InputError
from patchflow.io.images import read_image, write_image
from patchflow.learn_mixture import learn_student_t
from patchflow.learn_student import StudentObjective
from patchflow.numerics.patches import extract_patches
from patchflow.numerics.quadratic import coefficients, features
from patchflow.palm import palm, spring
from patchflow.priors import student_likelihood, student_maximization
from patchflow.priors.student import StudentMixture
from patchflow.priors.student_maximization import DEGREES, StudentFit, fit_student_mixture
from patchflow.priors.student_mixture import PatchStudentMixture


def parameters(components=3, dim=4):
    factors = torch.randn(components, dim, dim)
    scatters = factors @ factors.mT + 0.5 * torch.eye(dim)
    weights = torch.rand(components) + 0.2
    degrees = torch.tensor([0.7, 4.0, 60.0])[:components]
    return weights / weights.sum(), 2 * torch.randn(components, dim), scatters, degrees


def scipy_log_density(x, weights, means, scatters, degrees):
    parts = [
        float(w) * scipy.stats.multivariate_t.pdf(x.numpy(), m.numpy(), s.numpy(), df=float(nu))
        for w, m, s, nu in zip(weights, means, scatters, degrees, strict=True)
    ]
    return torch.from_numpy(np.log(sum(parts)))


def test_energy_and_gradient_on_patches_against_scipy(monkeypatch):
    monkeypatch.setattr("patchflow.priors.student_mixture._CHUNK", 7)
    law = PatchStudentMixture(*parameters())
    x = 3 * torch.randn(40, 4)
    energy, slope = law.value_and_grad(x)
    torch.testing.assert_close(energy, -scipy_log_density(x, *parameters_of(law)))
    point = x.clone().requires_grad_(True)
    exact = StudentMixture(*parameters_of(law))
    (expected,) = torch.autograd.grad(exact(point).sum(), point)
    torch.testing.assert_close(slope, expected)
    with torch.no_grad():
        torch.testing.assert_close(law(x), energy)
    # Far away it grows with the logarithm of the distance, (nu + d) of the heaviest tail.
    far = law(torch.tensor([[1e4, 0.0, 0.0, 0.0], [1e5, 0.0, 0.0, 0.0]]))
    assert float(far.diff()) == pytest.approx((0.7 + 4) * math.log(10), rel=1e-3)


def parameters_of(law):
    return law.gaussian.weights, law.gaussian.means, law.gaussian.covariances, law.degrees


def test_single_precision_is_enough():
    law = PatchStudentMixture(*parameters())
    x = 3 * torch.randn(50, 4)
    exact = law(x)
    single = PatchStudentMixture(*(t.float() for t in parameters_of(law)))(x.float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


def test_samples_have_the_law():
    """The median of the squared distance of one component is that of d F(d, nu)."""
    weights, means, scatters, degrees = (t[1:2] for t in parameters())
    x = PatchStudentMixture(weights, means, scatters, degrees).sample(20_000)
    centred = x - means
    squared = (centred @ torch.linalg.inv(scatters[0]) * centred).sum(1) / 4
    law = scipy.stats.f(4, 4.0)
    below = float((squared < law.median()).double().mean())
    assert abs(below - 0.5) < 5 * 0.5 / math.sqrt(20_000)


def test_one_step_of_em_by_hand():
    """Against the formulas, with a root finder for the degrees of freedom; the eigenvalues stay above the floor."""
    weights, means, scatters, degrees = parameters(2)
    x = StudentMixture(weights, means, scatters, degrees).sample(300)
    x = x[x.norm(dim=1) < 100]
    start = StudentFit(weights, means + 1, 2 * scatters, torch.tensor([2.0, 9.0]), [], False)
    found = fit_student_mixture(x, 2, start=start, max_iterations=1)
    joint, u = [], []
    for w, m, s, nu in zip(*start[:4], strict=True):
        law = scipy.stats.multivariate_t(m.numpy(), s.numpy(), df=float(nu))
        joint.append(math.log(w) + torch.from_numpy(law.logpdf(x.numpy())))
        squared = ((x - m) @ torch.linalg.inv(s) * (x - m)).sum(1)
        u.append((nu + 4) / (nu + squared))
    r, u = torch.stack(joint).softmax(0), torch.stack(u)
    assert found.log_likelihood[0] == pytest.approx(float(torch.stack(joint).logsumexp(0).mean()))
    for k in range(2):
        ru = r[k] * u[k]
        mean = (ru[:, None] * x).sum(0) / ru.sum()
        scatter = torch.einsum("n,ni,nj->ij", ru, x - mean, x - mean) / r[k].sum()
        torch.testing.assert_close(found.means[k], mean)
        torch.testing.assert_close(found.scatters[k], scatter)
        assert float(found.weights[k]) == pytest.approx(float(r[k].mean()))
        tail = float((r[k] * (u[k].log() - u[k])).sum() / r[k].sum())
        half = (float(start.degrees[k]) + 4) / 2

        def slope(nu, tail=tail, half=half):
            own = math.log(nu / 2) - scipy.special.digamma(nu / 2)
            return own + 1 + tail + scipy.special.digamma(half) - math.log(half)

        root = scipy.optimize.brentq(slope, *DEGREES)
        assert float(found.degrees[k]) == pytest.approx(root, rel=1e-8)


@pytest.mark.parametrize("floor", [1e-6, 0.6])
def test_em_never_loses_and_finds_the_truth(floor):
    torch.manual_seed(2)
    scatters = torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[0.4, -0.2], [-0.2, 0.8]]])
    truth = (
        torch.tensor([0.6, 0.4]),
        torch.tensor([[0.0, 0.0], [6.0, 3.0]]),
        scatters,
        torch.tensor([3.0, 8.0]),
    )
    x = StudentMixture(*truth).sample(4000)
    found = fit_student_mixture(x, 2, floor=floor, tolerance=1e-6)
    history = found.log_likelihood
    assert all(b >= a - 1e-12 for a, b in zip(history, history[1:], strict=False))
    assert history[-1] > history[0] + 1e-3
    assert found.converged
    assert float(torch.linalg.eigvalsh(found.scatters).min()) >= floor * (1 - 1e-9)
    law = StudentMixture(*found[:4])
    assert -float(law(x).mean()) == pytest.approx(history[-1], abs=1e-9)
    if floor < 0.1:
        order = found.means[:, 0].argsort()
        # The truth is no better on these points, and the parameters are near it.
        assert history[-1] > -float(StudentMixture(*truth)(x).mean())
        torch.testing.assert_close(found.means[order], truth[1], rtol=0, atol=0.15)
        torch.testing.assert_close(found.scatters[order], scatters, rtol=0, atol=0.15)
        torch.testing.assert_close(found.degrees[order].log(), truth[3].log(), rtol=0, atol=0.35)


def test_degrees_stay_in_their_interval():
    """Of bounded points they want to be infinite: then the mixture is the Gaussian one."""
    x = torch.rand(2000, 2)
    found = fit_student_mixture(x, 1, tolerance=1e-9, max_iterations=200)
    assert float(found.degrees) > 100
    torch.testing.assert_close(found.scatters[0], x.T.cov(correction=0), rtol=0.05, atol=1e-3)


def data_and_start(count=400):
    torch.manual_seed(4)
    weights, means, scatters, _ = parameters(2, 3)
    x = StudentMixture(weights, 2 * means, scatters, torch.tensor([3.0, 6.0])).sample(count)
    return x, fit_student_mixture(x, 2, max_iterations=2, floor=0.2, tolerance=0.0)


def test_objective_is_the_mean_energy_and_its_gradient_is_right():
    x, start = data_and_start()
    objective = StudentObjective(x, start)
    energies = StudentMixture(*start[:4])(x)
    torch.testing.assert_close(objective(), energies.mean())
    index = torch.tensor([3, 5, 8])
    torch.testing.assert_close(objective(index), energies[index].mean())
    torch.testing.assert_close(objective.density()(x), energies)
    for block in objective.blocks:
        (p,) = block.tensors
        direction = torch.randn_like(p)
        (slope,) = torch.autograd.grad(objective(), p)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-6)
            values.append(objective().item())
            with torch.no_grad():
                p.sub_(direction, alpha=sign * 1e-6)
        expected = (values[0] - values[1]) / 2e-6
        assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("degrees", [[0.3, 2.0], [5.0, 900.0]])
def test_likelihood_is_differentiated_twice(degrees, monkeypatch):
    """Value, gradient and products with the Hessian in closed form, against automatic differentiation."""
    monkeypatch.setattr(student_likelihood, "_PIECE", 7)
    torch.manual_seed(0)
    phi = features(torch.randn(3, 40)).T
    precision = torch.randn(2, 3, 3)
    hessian = precision @ precision.mT + torch.eye(3)
    slope = torch.randn(2, 3)
    # Of minimum 0.1, so that no distance is cut off at zero.
    lowest = 0.5 * (slope * torch.linalg.solve(hessian, slope)).sum(1)
    theta = coefficients(hessian, slope, lowest + 0.1)
    leaves = [t.requires_grad_(True) for t in (theta, torch.randn(2), torch.tensor(degrees))]

    def expected(theta, offsets, nu):
        logs = torch.log1p(theta @ phi.T / nu[:, None])
        return -(offsets[:, None] - 0.5 * (nu + 3)[:, None] * logs).logsumexp(0).mean()

    found = student_likelihood.mean_energy(phi, *leaves, 3)
    torch.testing.assert_close(found, expected(*leaves))
    with torch.no_grad():
        assert torch.equal(student_likelihood.mean_energy(phi, *leaves, 3), found)
    for moving in ([0], [1], [2], [0, 1, 2]):
        chosen = [leaves[i] for i in moving]
        direction = [torch.randn_like(t) for t in chosen]
        products = []
        for function in (lambda *t: student_likelihood.mean_energy(phi, *t, 3), expected):
            slopes = torch.autograd.grad(3 * function(*leaves), chosen, create_graph=True)
            inner = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
            products.append([*slopes, *torch.autograd.grad(inner, leaves)])
        torch.testing.assert_close(products[0], products[1])


def test_palm_and_its_relatives_come_near_em():
    """From the start of EM after two steps: all lower the objective by a fifth of what EM gains."""
    x, start = data_and_start()
    exact = fit_student_mixture(x, 2, start=start, floor=0.1, tolerance=1e-6, max_iterations=200)
    gain = exact.log_likelihood[-1] - exact.log_likelihood[0]
    assert gain > 0.003
    for inertia in (0.0, 1.0):
        objective = StudentObjective(x, start)
        result = palm(objective, objective.blocks, inertia=inertia, steps=8, tolerance=None)
        assert result.objective[0] + exact.log_likelihood[0] == pytest.approx(0, abs=1e-9)
        assert result.objective[0] - result.objective[-1] > 0.2 * gain
    objective = StudentObjective(x, start)
    result = spring(
        objective, objective.blocks, len(x), batch=50, every=8, lr=0.4, inertia=0.5, epochs=2
    )
    assert result.objective[0] - result.objective[-1] > 0.2 * gain
    assert -float(objective.density()(x).mean()) == pytest.approx(-result.objective[-1])


def test_normal_data_do_not_send_the_degrees_to_infinity():
    """Without a bound the curvature in the degrees vanishes, and the step size with it."""
    torch.manual_seed(0)
    x = torch.randn(500, 2)
    start = fit_student_mixture(x, 2, max_iterations=1)
    for curvature in ("hessian", "backtracking"):
        objective = StudentObjective(x, start)
        result = spring(
            objective, objective.blocks, len(x), batch=50, epochs=10, curvature=curvature
        )
        assert math.isfinite(result.objective[-1])
        assert float(objective.density().degrees.max()) <= 900.1


def test_interruption_keeps_the_mixture(monkeypatch):
    calls, expect = 0, student_maximization._expect

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return expect(*arguments)

    monkeypatch.setattr(student_maximization, "_expect", interrupted)
    found = fit_student_mixture(torch.randn(100, 2), 2, tolerance=0.0)
    assert found.interrupted
    assert not found.converged
    assert len(found.log_likelihood) == 3
    assert found.means.shape == (2, 2)


def waves(rows, columns, shift=0.0):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.25 * torch.sin(0.5 * i + shift) + 0.2 * torch.cos(0.3 * j)
    return wave[None, None].float()


def test_learned_from_images_and_kept_in_a_file(tmp_path):
    image = waves(40, 40) + 0.05 * torch.randn(1, 1, 40, 40).float()
    prior, record = learn_student_t([image], size=3, components=4, count=800, dihedral=True)
    patches = extract_patches(image[0], 3)
    exact = StudentMixture(*(t.double() for t in record[:4]))(patches.double())
    torch.testing.assert_close(prior.patch_energy(patches).double(), exact, rtol=1e-3, atol=1e-3)
    pf.save(tmp_path / "m.safetensors", prior)
    again = pf.load(tmp_path / "m.safetensors", pf.PatchPrior)
    torch.testing.assert_close(again(image), prior(image), rtol=0, atol=0)


@pytest.mark.usefixtures("as_users_do")
def test_train_and_reconstruct(capsys):
    write_image("train.tif", waves(48, 48))
    truth = waves(40, 44, 0.7)
    torch.manual_seed(1)
    write_image("y.tif", truth + 0.1 * torch.randn_like(truth))
    train = ["train", "student-t", "train.tif", "--components=5", "--size=4"]
    assert main([*train, "-o", "m.safetensors"]) == 0
    assert "degrees of freedom" in capsys.readouterr().out
    run = ["reconstruct", "y.tif", "--problem=denoising", "--noise=0.1", "--method=student-t"]
    assert main([*run, "--prior=m.safetensors", "--weight=1", "-o", "x.tif"]) == 0
    errors = [
        float((read_image(path, slack=1) - truth).square().mean()) for path in ("x.tif", "y.tif")
    ]
    assert errors[0] < 0.6 * errors[1]
    assert main([*run, "-o", "x.tif"]) == 2
    assert "patchflow train student-t" in capsys.readouterr().err


def test_bad_input():
    weights, means, scatters, degrees = parameters()
    with pytest.raises(InputError, match="for .3,. weights, the smallest -1; give a positive"):
        PatchStudentMixture(weights, means, scatters, torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(InputError, match="Got .2,. degrees"):
        PatchStudentMixture(weights, means, scatters, degrees[:2])
    with pytest.raises(InputError, match="not positive definite"):
        PatchStudentMixture(weights, means, -scatters, degrees)
    x = torch.randn(50, 4)
    start = StudentFit(weights, means, scatters, degrees, [], False)
    with pytest.raises(InputError, match="start has locations of .3, 4. but there are 2"):
        fit_student_mixture(x, 2, start=start)
    with pytest.raises(InputError, match="not finite"):
        fit_student_mixture(x / 0, 2)
    with pytest.raises(InputError, match="cannot place 60"):
        fit_student_mixture(x, 60)
    with pytest.raises(InputError, match="degree of freedom of the start is 0.05"):
        StudentObjective(x, start._replace(degrees=torch.tensor([0.05, 1.0, 2.0])))
    with pytest.raises(InputError, match=r"no weight may be below exp\(-10\)"):
        StudentObjective(x, start._replace(weights=torch.tensor([1e-9, 0.5, 0.5])))
    with pytest.raises(InputError, match="patches is 0"):
        learn_student_t([torch.rand(1, 1, 9, 9)], count=0)
    with pytest.raises(InputError, match="mixture of 0 components"):
        models.student_t(components=0)
