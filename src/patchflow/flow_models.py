"""Premade flows without couplings: residual, proximal residual and continuous ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchflow.chains.bijections import ActNorm
from patchflow.chains.continuous import ContinuousFlow, Solver
from patchflow.chains.contractions import Contraction, ProximalNet, SpectralNet
from patchflow.chains.flow import Flow
from patchflow.chains.kernel import Chain, Kernel
from patchflow.chains.residual import ResidualBlock, Trace
from patchflow.chains.velocities import Potential, VelocityNet
from patchflow.errors import InputError
from patchflow.priors.gaussian import StandardNormal


def residual_flow(
    dim: int,
    *,
    blocks: int = 10,
    hidden: int = 64,
    depth: int = 2,
    coefficient: float = 0.9,
    condition_dim: int = 0,
    trace: Trace = "auto",
) -> Flow:
    r"""A residual flow: blocks :math:`x + g(x)` of bounded spectral norm, with scales and shifts between them.

    Call :func:`whiten` with data before training. Training is explicit; sampling solves for the inverse of each block.

    Args:
        dim: Dimension of the points.
        blocks: Number of residual blocks.
        hidden: Width of the networks.
        depth: Their hidden layers.
        coefficient: Lipschitz constant of :math:`g`, below 1.
        condition_dim: Dimension of the condition; 0 for none.
        trace: Log-determinants: ``"exact"``, ``"unbiased"``, or ``"auto"``, exact up to dimension 8.

    Raises:
        InputError: If a size is not positive or the coefficient not between 0 and 1.

    References:
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks", 2019,
        https://arxiv.org/abs/1811.00995
        Chen, Behrmann, Duvenaud, Jacobsen, "Residual flows for invertible generative modeling", 2019,
        https://arxiv.org/abs/1906.02735
    """
    arguments = dict(locals())
    nets = [
        SpectralNet(dim, condition_dim, coefficient=coefficient, hidden=hidden, depth=depth)
        for _ in range(blocks)
    ]
    return _residual(nets, trace, "residual_flow", arguments)


def proximal_residual_flow(
    dim: int,
    *,
    blocks: int = 10,
    hidden: int = 64,
    depth: int = 3,
    coefficient: float = 0.97,
    condition_dim: int = 0,
    trace: Trace = "auto",
) -> Flow:
    r"""A proximal residual flow: blocks :math:`x + \gamma \Psi(x)` with averaged networks of orthonormal weights.

    Call :func:`whiten` with data before training.

    Args:
        dim: Dimension of the points.
        blocks: Number of residual blocks; the published flows have 20.
        hidden: Width of the networks, at least ``dim``.
        depth: Their layers.
        coefficient: Lipschitz constant of the equivalent contraction, below 1; the published :math:`\gamma = 1.99`
            with three layers is 0.997. See :class:`~patchflow.chains.contractions.ProximalNet`.
        condition_dim: Dimension of the condition; 0 for none.
        trace: Log-determinants: ``"exact"``, ``"unbiased"``, or ``"auto"``, exact up to dimension 8.

    Raises:
        InputError: If a size does not fit or the coefficient is not between 0 and 1.

    References:
        Hertrich, "Proximal residual flows for Bayesian inverse problems", 2023, https://arxiv.org/abs/2211.17158
    """
    arguments = dict(locals())
    nets = [
        ProximalNet(dim, condition_dim, coefficient=coefficient, hidden=hidden, depth=depth)
        for _ in range(blocks)
    ]
    return _residual(nets, trace, "proximal_residual_flow", arguments)


def continuous_flow(
    dim: int,
    *,
    velocity: Literal["net", "potential"] = "net",
    hidden: int = 64,
    depth: int = 3,
    condition_dim: int = 0,
    trace: Trace = "auto",
    method: Solver = "dopri5",
    tolerance: float = 1e-5,
    steps: int = 16,
) -> Flow:
    r"""A continuous flow: a neural ordinary differential equation, with a scale and a shift at the data.

    Train it with ``fit(flow, ...)``, or with ``fit(TransportKL(flow), ...)`` for straight paths. It needs torchdiffeq:
    ``pip install 'patchflow[ode]'``.

    Args:
        dim: Dimension of the points.
        velocity: A fully connected network, or OT-Flow's ``"potential"``, whose trace has a closed form.
        hidden: Width of the network; OT-Flow's toy examples have 32.
        depth: Hidden layers of ``"net"``; a potential has two.
        condition_dim: Dimension of the condition; 0 for none.
        trace: Divergences: ``"exact"``, ``"unbiased"``, or ``"auto"``, exact up to dimension 8 and for potentials.
        method: The solver; see :class:`~patchflow.chains.continuous.ContinuousFlow`.
        tolerance: Tolerance of an adaptive solver.
        steps: Steps of a solver with fixed steps.

    Raises:
        InputError: If a size is not positive or an option does not exist.

    References:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: free-form continuous dynamics for scalable
        reversible generative models", 2019, https://arxiv.org/abs/1810.01367
        Onken, Wu Fung, Li, Ruthotto, "OT-Flow: fast and accurate continuous normalizing flows via optimal transport",
        2021, https://arxiv.org/abs/2006.00104
    """
    arguments = dict(locals())
    if velocity not in ("net", "potential"):
        raise InputError(f"There is no velocity {velocity!r}; choose from net, potential.")
    field = (
        VelocityNet(dim, condition_dim, hidden=hidden, depth=depth)
        if velocity == "net"
        else Potential(dim, condition_dim, hidden=hidden)
    )
    kernel = ContinuousFlow(field, trace=trace, method=method, tolerance=tolerance, steps=steps)
    return _named(Chain(kernel, ActNorm(dim)), dim, "continuous_flow", arguments)


@torch.no_grad()
def whiten(flow: Flow, x: Float[Tensor, "batch dim"], condition: Tensor | None = None) -> None:
    """Initialise the scales and shifts of a chain from data, so that training starts with latent points of size one.

    Each :class:`~patchflow.chains.bijections.ActNorm`, from the data on, gets the mean and the standard deviation of
    what arrives there.

    Args:
        flow: The flow.
        x: A batch of data, at least two points.
        condition: Their measurements, or ``None``.

    Raises:
        InputError: If a coordinate does not vary over the batch.

    References:
        Kingma, Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018,
        https://arxiv.org/abs/1807.03039
    """
    kernels = list(flow.chain) if isinstance(flow.chain, Chain) else [flow.chain]
    for kernel in reversed(kernels):
        if isinstance(kernel, ActNorm):
            kernel.initialize(x)
        x = kernel.reverse(x, condition).x


def _residual(
    nets: Sequence[Contraction],
    trace: Trace,
    name: str,
    arguments: dict[str, Any],
) -> Flow:
    if not nets:
        raise InputError(f"A flow of {arguments['blocks']} blocks is not a flow; use at least 1.")
    dim = nets[0].dim
    # A block moves points by less than their distance: scales between blocks let the flow contract and expand.
    kernels: list[Kernel] = [ActNorm(dim)]
    for net in nets:
        kernels += [ResidualBlock(net, trace=trace), ActNorm(dim)]
    return _named(Chain(*kernels), dim, name, arguments)


def _named(chain: Chain, dim: int, name: str, arguments: dict[str, Any]) -> Flow:
    flow = Flow(StandardNormal(dim), chain)
    flow.made_by = (name, arguments)  # pyright: ignore[reportArgumentType]
    return flow
