"""``patchflow calibrate --model``: whether the samples of a posterior model are right."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from patchflow.calibration_plots import draw_calibration
from patchflow.chains.flow import Flow
from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import output_folder
from patchflow.cli.posterior_problem import (
    Problem,
    at_least,
    given,
    load_fitting,
    load_problem,
    model_data_dim,
)
from patchflow.errors import NumericalError
from patchflow.io.atomic import write_bytes, write_text
from patchflow.progress import progress_line
from patchflow.report import versions
from patchflow.uncertainty.calibration import (
    sbc_ranks,
    sbc_test,
    tarp_coverage,
    tarp_deviation,
    tarp_test,
)
from patchflow.uncertainty.evidence import sample_posterior

# The probability of a false alarm, over all tests together.
_LEVEL = 0.01
# The flags that concern the test of a model.
_OF_MODEL = ("problem", "model", "output", "datasets", "draws", "correct", "seed", "threads")
# Walks at a time.
_BLOCK = 16_384
_REMEDY = (
    "train longer (--steps), with more --layers or --mcmc_steps (and more --simulations, where their number is "
    "limited), or sample with --correct metropolis."
)


@dataclass(frozen=True)
class Judgement:
    """What the ranks say about one parameter.

    Attributes:
        name: The parameter.
        narrowing: Mean standard deviation of the posteriors over that of the prior: 1 means nothing was learned.
        mean_rank: Mean rank of the truth among the draws, from 0 to 1; above 0.5 the draws are too low.
        spread: Mean distance of the ranks from the middle over the right one; above 1 the draws are too narrow.
        p_ranks: The p-value of the chi-square test of the ranks.
        p_mean: The p-value of the mean rank.
        p_spread: The p-value of the spread.
        faults: What is wrong, in words; empty if nothing is.
    """

    name: str
    narrowing: float
    mean_rank: float
    spread: float
    p_ranks: float
    p_mean: float
    p_spread: float
    faults: list[str]


def check_model(problem: str, model: str, settings: dict[str, Any]) -> None:
    """Test the samples of a posterior model, and write the folder.

    Args:
        problem: The Python file of the training.
        model: The model file.
        settings: All flags of the command.

    Raises:
        InputError: If the files do not fit together, or a number is out of range.
        NumericalError: If measurements or samples are not finite.
    """
    datasets, draws = (
        default if settings[name] is None else settings[name]
        for name, default in (("datasets", 300), ("draws", 200))
    )
    own = {key: value for key, value in settings.items() if key in _OF_MODEL}
    settings = own | {"datasets": datasets, "draws": draws}
    at_least(20, {"datasets": datasets})
    at_least(2, {"draws": draws})
    model_data_dim(model)
    found = load_problem(problem, seed=settings["seed"], threads=settings["threads"])
    flow, warnings = load_fitting(model, found)
    folder = output_folder(settings["output"])
    for warning in warnings:
        print(f"patchflow: warning: {warning}", file=sys.stderr)
    truths, samples = _sampled(flow, found, datasets, draws, settings["correct"] == "metropolis")
    ranks = sbc_ranks(samples, truths)
    levels, coverage = tarp_coverage(samples, truths)
    p_coverage = tarp_test(samples, truths)
    judgements = _judge(found.names, truths, samples, ranks)
    verdict = _verdict(judgements, p_coverage, datasets)
    picture = folder / "calibration.png"
    write_bytes(picture, draw_calibration(ranks, draws, levels, coverage, found.names))
    lines = [found.names, *ranks.tolist()]
    write_text(folder / "ranks.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    document = {
        "command": command_line("calibrate", settings),
        "settings": given(settings),
        "verdict": verdict,
        "level": _LEVEL,
        "tests": _test_count(len(judgements)),
        "parameters": [asdict(judgement) for judgement in judgements],
        "coverage": {
            "p": p_coverage,
            "deviation": tarp_deviation(levels, coverage),
            "levels": levels.tolist(),
            "coverage": coverage.tolist(),
        },
        "versions": versions(),
    }
    write_text(folder / "calibration.json", json.dumps(document, indent=1, ensure_ascii=False))
    write_config(folder / "calibration.yaml", "calibrate", settings)
    print(f"{_table(judgements)}\n\njoint coverage: p = {p_coverage:.2g}\n\n{verdict}\n\n{picture}")


@torch.no_grad()
def _sampled(
    flow: Flow, problem: Problem, datasets: int, draws: int, metropolis: bool
) -> tuple[Tensor, Tensor]:
    """True parameters, (datasets, dim), and samples of their posteriors, (datasets, draws, dim)."""
    truths = problem.prior.sample(datasets)
    y = problem.likelihood.simulate(truths)
    if not y.isfinite().all():
        raise NumericalError(
            f"{int((~y.isfinite()).any(1).sum())} of {datasets} simulated measurements are not finite; mend the "
            "forward model, or restrict the prior to where it works."
        )
    parts = []
    with progress_line(total=datasets, unit="dataset") as bar:
        for block in y.split(1 if metropolis else max(1, _BLOCK // draws)):
            if metropolis:
                x = sample_posterior(flow, draws, block, correct="metropolis").x
            else:
                # One measurement for each walk, so that those of many are walked together.
                x = flow.sample(len(block) * draws, block.repeat_interleave(draws, 0))
            parts.append(x.view(len(block), draws, -1))
            bar.update(len(block))
    samples = torch.cat(parts)
    broken = int((~samples.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise NumericalError(
            f"The samples of {broken} of {datasets} measurements are not finite; train the model again, with a "
            "smaller lr."
        )
    return truths, samples


def _judge(
    names: tuple[str, ...], truths: Tensor, samples: Tensor, ranks: Tensor
) -> list[Judgement]:
    draws = samples.shape[1]
    # Mean and variance under uniform ranks are exact; the law of the mean is nearly normal.
    places = (torch.arange(draws + 1, dtype=torch.float64) + 0.5) / (draws + 1)
    where = places[ranks]
    p_mean = _p_of_mean(where, places)
    p_spread = _p_of_mean((where - 0.5).abs(), (places - 0.5).abs())
    spread = (where - 0.5).abs().mean(0) / (places - 0.5).abs().mean()
    narrowing = (samples.std(1).mean(0) / truths.std(0)).double()
    columns = (narrowing, where.mean(0), spread, sbc_test(ranks, draws), p_mean, p_spread)
    level = _LEVEL / _test_count(len(names))
    judgements = []
    figures = torch.stack(columns, 1).tolist()
    for name, (narrow, mean, wide, *p_values) in zip(names, figures, strict=True):
        low_ranks, low_mean, low_spread = (p < level for p in p_values)
        faults = []
        if low_mean:
            faults.append(f"biased (its draws are too {'low' if mean > 0.5 else 'high'})")
        if low_spread:
            faults.append("overconfident" if wide > 1 else "underconfident")
        if low_ranks and not faults:
            faults.append("wrong in shape")
        judgements.append(Judgement(name, narrow, mean, wide, *p_values, faults=faults))
    return judgements


def _p_of_mean(values: Tensor, uniform: Tensor) -> Tensor:
    error = (uniform.var(correction=0) / len(values)).sqrt()
    # Both tails of the normal law; torch.special.ndtr rounds them to zero.
    return torch.erfc((values.mean(0) - uniform.mean()).abs() / (math.sqrt(2) * error))


def _test_count(parameters: int) -> int:
    return 3 * parameters + 1


def _verdict(judgements: list[Judgement], p_coverage: float, datasets: int) -> str:
    tests = _test_count(len(judgements))
    faults = [f"{j.name} is {' and '.join(j.faults)}" for j in judgements if j.faults]
    if p_coverage < _LEVEL / tests:
        faults.append("the joint coverage is wrong")
    if faults:
        return f"Not calibrated: {'; '.join(faults)}; {_REMEDY}"
    few = "; for more than gross faults give --datasets 300" if datasets < 200 else ""
    return (
        f"Calibrated: none of {tests} tests on {datasets} measurements rejects, at the level {_LEVEL:g} for all "
        f"together{few}."
    )


def _table(judgements: list[Judgement]) -> str:
    titles = ["parameter", "sd / prior sd", "mean rank", "spread", "p ranks", "p mean", "p spread"]
    grid = [titles]
    for j in judgements:
        figures = [f"{value:.3f}" for value in (j.narrowing, j.mean_rank, j.spread)]
        p_values = [f"{value:.2g}" for value in (j.p_ranks, j.p_mean, j.p_spread)]
        grid.append([j.name, *figures, *p_values])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in grid]
    return "\n".join(map("  ".join, lines))
