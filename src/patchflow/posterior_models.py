"""Premade conditional flows: posteriors that are learned once and sampled for every measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchflow.chains.bijections import AffineCoupling, random_permutation
from patchflow.chains.coordinates import ConditionalAffine, Conjugated, FromNormal, Pulled
from patchflow.chains.features import NormalScores
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Conditioned, Kernel
from patchflow.chains.proposals import Independent, LangevinProposal, RandomWalk, StepSize
from patchflow.chains.splines import SplineCoupling
from patchflow.chains.stochastic import Metropolis
from patchflow.energy import Density, Energy, Interpolation, Transported
from patchflow.errors import InputError
from patchflow.io.checkpoint import ModelHeader, load_into, load_model, save_model
from patchflow.priors.gaussian import StandardNormal
from patchflow.priors.mixture import ConditionalMixture
from patchflow.problems.likelihood import Likelihood

Layers = Literal["independence", "mala", "mh", "none"]
_NAME = "conditional_snf"


def conditional_snf(
    likelihood: Likelihood,
    prior: Density,
    condition_dim: int,
    *,
    couplings: Literal["spline", "affine"] = "spline",
    layers: int = 4,
    hidden: int = 64,
    components: int = 0,
    mcmc: Layers = "independence",
    mcmc_steps: int = 5,
    step_size: float = 0.3,
) -> Flow:
    r"""A stochastic normalizing flow for the posterior of every measurement.

    Couplings conditional on :math:`y`, in the normal scores of the prior; then Metropolis kernels that leave the
    posterior
    invariant. Train it with :func:`patchflow.learn_posterior`, or with ``fit(snf, joint_batches(prior, likelihood))``
    after ``prepare``.

    Args:
        likelihood: The likelihood: forward model and noise.
        prior: The prior; one with normal scores (:class:`~patchflow.energy.Transported`) makes training easiest.
        condition_dim: Number of values of a measurement.
        couplings: Rational-quadratic splines, or the published affine couplings.
        layers: Coupling layers.
        hidden: Width of their networks.
        components: Components of a mixture as latent distribution, for posteriors with several modes; 0 for a standard
            normal.
        mcmc: The Metropolis kernels after the couplings: ``"independence"`` proposes from the couplings' flow;
            ``"mala"`` and
            ``"mh"`` walk in its latent coordinates, where every posterior is nearly normal; ``"none"`` leaves them out.
        mcmc_steps: Their steps.
        step_size: Step size of ``"mala"`` and ``"mh"`` before adaptation.

    Raises:
        InputError: If an argument does not fit, or the prior lacks a dimension.

    References:
        Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint",
        2022, https://arxiv.org/abs/2109.11375
    """
    arguments = {
        key: value for key, value in locals().items() if key not in ("likelihood", "prior")
    }
    if layers < 1 or condition_dim < 1:
        raise InputError(
            f"Got {layers} layers and {condition_dim} measured values; use at least 1."
        )
    dim = prior.sample(1).shape[1]
    features = NormalScores(condition_dim)
    kernels: list[Kernel] = []
    for layer in range(layers):
        if couplings == "spline":
            kernels.append(SplineCoupling(dim, condition_dim, hidden=hidden))
        else:
            kernels.append(AffineCoupling(dim, condition_dim, hidden=hidden))
        kernels.append(random_permutation(dim, seed=layer + 1))
    scores = isinstance(prior, Transported)
    if scores:
        kernels.append(ConditionalAffine(dim, condition_dim, hidden=hidden))
    amortized = Conditioned(features, Chain(*kernels))
    latent = (
        ConditionalMixture(dim, components, condition_dim, features=NormalScores(condition_dim))
        if components
        else StandardNormal(dim)
    )
    target = likelihood + prior
    if scores:
        coordinates = FromNormal(prior)
        pulled = Pulled(target, coordinates)
        walker = _metropolis(pulled, latent, amortized, mcmc, mcmc_steps, step_size)
        chain = [amortized, coordinates, *(Conjugated(kernel, coordinates) for kernel in walker)]
    else:
        chain = [amortized, *_metropolis(target, latent, amortized, mcmc, mcmc_steps, step_size)]
    flow = Flow(latent, Chain(*chain), target=target)
    flow.made_by = (_NAME, arguments)  # pyright: ignore[reportArgumentType]
    for module in (likelihood, prior):
        module.requires_grad_(False)
    return flow


def interleaved_snf(
    posterior: Energy,
    dim: int,
    condition_dim: int,
    *,
    layers: int = 2,
    couplings: int = 4,
    hidden: int = 128,
    mcmc: Literal["mala", "mh"] = "mala",
    mcmc_steps: int = 3,
    step_size: float = 1e-4,
    learned: bool = False,
) -> Flow:
    r"""The published conditional SNF: affine couplings and Metropolis kernels in turn, annealed to the posterior.

    The Metropolis kernels of layer :math:`k` of :math:`K` leave :math:`p_k \propto p_Z^{1 - k/K} p_{X|Y=y}^{k/K}`
    invariant; their
    step sizes depend on :math:`y` (see :func:`patchflow.adapt`). The last layer's are not trained through.

    Args:
        posterior: The energy of the posterior, likelihood plus prior; differentiable for ``"mala"``.
        dim: Dimension of the parameters.
        condition_dim: Number of values of a measurement.
        layers: Blocks of couplings and Metropolis steps.
        couplings: Couplings of a block.
        hidden: Width of their networks.
        mcmc: ``"mala"``, or ``"mh"`` for random walks.
        mcmc_steps: Accept steps of a block.
        step_size: Time step of MALA, or standard deviation of the random walk, before adaptation.
        learned: Whether the interpolation weights of the inner blocks are learned.

    Raises:
        InputError: If a number is not positive.

    References:
        Hagemann, Hertrich, Steidl, "Stochastic normalizing flows for inverse problems: a Markov chains viewpoint",
        2022, https://arxiv.org/abs/2109.11375
    """
    if min(layers, couplings) < 1:
        raise InputError(f"Got {layers} layers of {couplings} couplings; use at least 1.")
    latent, kernels = StandardNormal(dim), []
    for layer in range(1, layers + 1):
        kernels += [AffineCoupling(dim, condition_dim, hidden=hidden) for _ in range(couplings)]
        last = layer == layers
        target = (
            posterior if last else Interpolation(latent, posterior, layer / layers, learned=learned)
        )
        step = StepSize(step_size, condition_dim)
        proposal = LangevinProposal(step) if mcmc == "mala" else RandomWalk(step)
        kernels.append(Metropolis(target, proposal, mcmc_steps))
    posterior.requires_grad_(False)
    return Flow(latent, Chain(*kernels), target=posterior)


def _metropolis(
    target: Any, latent: Density, amortized: Kernel, mcmc: Layers, steps: int, size: float
) -> list[Kernel]:
    if mcmc == "none":
        return []
    if mcmc == "independence":
        return [Metropolis(target, Independent(Flow(latent, amortized)), steps)]
    if mcmc not in ("mala", "mh"):
        raise InputError(f"There is no layer {mcmc!r}; choose from independence, mala, mh, none.")
    inner = Pulled(target, amortized)
    proposal = LangevinProposal(size**2 / 2) if mcmc == "mala" else RandomWalk(size)
    return [Conjugated(Metropolis(inner, proposal, steps), amortized)]


def joint_batches(
    prior: Density, likelihood: Likelihood, size: int = 1024
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of the joint law: parameters of the prior with simulated measurements, fresh at each call.

    Args:
        prior: The prior.
        likelihood: The likelihood that simulates.
        size: Rows of a batch.
    """

    @torch.no_grad()
    def draw() -> tuple[Tensor, Tensor]:
        x = prior.sample(size)
        return x, likelihood.simulate(x)

    return draw


def prepare(flow: Flow, x: Tensor, y: Tensor) -> None:
    """Initialise what a flow takes from data: the features of measurements, and the components of a mixture.

    Args:
        flow: The flow.
        x: Parameters, (batch, dim).
        y: Their measurements, (batch, condition_dim).

    Raises:
        InputError: If the shapes do not fit, or a measurement is not finite.
    """
    for module in flow.modules():
        if isinstance(module, NormalScores):
            module.initialize(y)
        if isinstance(module, ConditionalMixture):
            coordinates = [k for k in flow.chain.modules() if isinstance(k, FromNormal)]
            module.initialize(coordinates[0].prior.to_normal(x) if coordinates else x)


def save_posterior_model(path: str | Path, flow: Flow, training: dict[str, Any]) -> None:
    """Write what was learned of a conditional flow; likelihood and prior stay in the user's file.

    Args:
        path: The file, usually ``*.safetensors``.
        flow: What :func:`conditional_snf` returned.
        training: What is worth knowing about the training: JSON values.
    """
    name, arguments = vars(flow)["made_by"]
    header = ModelHeader(name, arguments, "", training.get("seed"), training)
    save_model(path, _learned(flow).state_dict(), header)


def load_posterior_model(path: str | Path, likelihood: Likelihood, prior: Density) -> Flow:
    """Read a conditional flow for a problem, frozen.

    Args:
        path: The file.
        likelihood: The likelihood that it was learned for.
        prior: The prior that it was learned for.

    Raises:
        InputError: If the file is not such a model, or was learned for a problem of other dimensions.
    """
    header, state = load_model(path)
    if header.model != _NAME:
        raise InputError(
            f"{path} holds the model {header.model!r}, but sampling needs one of patchflow train conditional-snf."
        )
    flow = conditional_snf(likelihood, prior, **dict(header.arguments))
    load_into(_learned(flow), state, path)
    return flow.requires_grad_(False)


def _learned(flow: Flow) -> nn.Module:
    assert isinstance(flow.chain, Chain)
    steps = [module for module in flow.chain.modules() if isinstance(module, StepSize)]
    parts = {"amortized": flow.chain[0], "steps": nn.ModuleList(steps)}
    if isinstance(flow.latent, ConditionalMixture):
        parts["latent"] = flow.latent
    return nn.ModuleDict(parts)
