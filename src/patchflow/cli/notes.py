"""What ``patchflow reconstruct`` says of a reconstruction: how its weight was chosen, and if its solver converged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from patchflow.problems.likelihood import GaussianLikelihood, Likelihood
from patchflow.problems.sampling import Mask
from patchflow.reconstruct.automatic_weight import Trial, WeightChoice, choose_weight
from patchflow.solution import Solution

# A residual of so small a share of the noise follows the noise: with the weights of the tables it is .4 to 1
# (benchmarks/tune.py prints it), least after super-resolution, which knows few pixels.
_SMALL = 0.25
# One so large is no noise: either the data are not fitted, or they are of another operator, noise or range.
_LARGE = 2.0


def choose(
    solve: Callable[[Tensor, float], Solution],
    likelihood: Likelihood,
    y: Tensor,
    *,
    start: float,
    level: str,
) -> tuple[WeightChoice, list[str]]:
    """Choose the weight of ``--weight auto``, and print each trial.

    Args:
        solve: Reconstructs a measurement with a weight.
        likelihood: The law of the measurement.
        y: The measurement.
        start: The default weight.
        level: The flag that says how large the noise is.

    Returns:
        The choice, and what there is to say about it.

    Raises:
        InputError: See :func:`patchflow.reconstruct.automatic_weight.choose_weight`.
        NumericalError: As well.
    """

    def tell(trial: Trial) -> None:
        print(
            f"weight {trial.weight:.4g}: residual {trial.discrepancy:.3f} of the noise's variance, "
            f"estimated risk {trial.risk:.4g}"
        )

    choice = choose_weight(solve, likelihood, y, start=start, report=tell)
    other = choice.by_discrepancy
    approximate = (
        ""
        if isinstance(likelihood, GaussianLikelihood)
        else " (of the sinogram, its noise taken as Gaussian with the variance that the counts say)"
    )
    notes = [
        f"Weight {choice.weight:.4g} by Stein's risk estimate{approximate}; "
        + ("none has" if other is None else f"{other:.4g} has")
        + " a residual as large as the noise (discrepancy principle)."
    ]
    if choice.at_end:
        notes.append(
            f"The estimated risk is smallest at the end of what was tried: check {level}, or give a weight."
        )
    if not choice.agree:
        notes.append(
            f"The two disagree by more than a factor of four: check {level}, and look at both reconstructions."
        )
    return choice, notes


def residual_of(likelihood: GaussianLikelihood, x: Tensor, y: Tensor) -> float:
    """The root mean square of the residual where there is a measurement.

    Args:
        likelihood: The law of the measurement.
        x: The reconstructions.
        y: The measurements.
    """
    wrong, operator = likelihood.operator(x) - y, likelihood.operator
    seen = operator.mask.expand_as(wrong) > 0 if isinstance(operator, Mask) else ...
    return float(wrong[seen].square().mean().sqrt())


def misfit(residual: float, noise: float, *, weighted: bool = True) -> list[str]:
    """A sentence if the residual is so small that the noise must be in the image, or far above the noise; else none.

    Args:
        residual: The root mean square of the residual.
        noise: The standard deviation of the noise.
        weighted: Whether the method has a weight; networks and samples, which have none, may have small residuals.
    """
    if residual > _LARGE * noise:
        remedy = (
            "lower --weight"
            if weighted
            else "compare with --method tv, as the model may know other images"
        )
        return [
            f"The residual is {residual / noise:.3g} times the noise, so that the image does not explain the "
            f"measurement: {remedy}, or check --noise, --range and the operator."
        ]
    if residual > _SMALL * noise or not weighted:
        return []
    return [
        f"The residual is {residual / noise:.2f} of the noise, so that noise is in the image: raise --weight, or check "
        "--noise and how well the prior has learned."
    ]


def convergence(solutions: Sequence[Solution], advice: str = "") -> list[str]:
    """A sentence if solvers with a criterion of convergence stopped before they met it; else none.

    Args:
        solutions: The reconstructions, one for each slice or for all images.
        advice: What to do about it.
    """
    # Steps that were fixed beforehand have no such criterion, and an interruption is told elsewhere.
    missed = [s for s in solutions if s.converged is False and not s.interrupted]
    if not missed:
        return []
    where = f" in {len(missed)} of {len(solutions)} slices" if len(solutions) > 1 else ""
    most = max(solution.steps for solution in missed)
    return [f"Not converged{where}: the solver stopped at its limit of {most} steps{advice}."]
