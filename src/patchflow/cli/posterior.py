"""``patchflow train conditional-snf``: learn the posteriors of the parameters of a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from patchflow.cli.config import command_line, write_config
from patchflow.cli.options import check_output
from patchflow.cli.posterior_problem import (
    at_least,
    load_problem,
)
from patchflow.errors import InputError, NumericalError
from patchflow.io.atomic import existing_file
from patchflow.learn_posterior import learn_posterior
from patchflow.posterior_models import conditional_snf, save_posterior_model


def train_conditional_snf(
    *,
    problem: str,
    output: str = "snf.safetensors",
    layers: int = 4,
    hidden: int = 64,
    couplings: Literal["spline", "affine"] = "spline",
    components: int = 0,
    mcmc: Literal["independence", "mala", "mh", "none"] = "independence",
    mcmc_steps: int = 5,
    batch: int = 1024,
    steps: int = 5000,
    lr: float = 2e-3,
    seconds: float | None = None,
    simulations: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
) -> None:
    """Learn the posteriors of all measurements of a simulator with a stochastic normalizing flow.

    Writes the model, and beside it the configuration (.yaml) that repeats the run. Ctrl-C keeps the best state so far;
    --resume true continues.

    Args:
        problem: Python file that defines likelihood (a patchflow.Likelihood), prior (a patchflow.Density) and perhaps
            names (a list of strings).
        output: Model file to write; also -o.
        layers: Coupling layers of the flow.
        hidden: Width of its networks.
        couplings: Rational-quadratic splines, or affine couplings.
        components: Components of a mixture as latent distribution, for posteriors with several modes; 0 for one
            normal distribution.
        mcmc: Metropolis kernels after the couplings; mala needs the gradient of the forward model.
        mcmc_steps: Their steps.
        batch: Simulations per training step.
        steps: Training steps.
        lr: Peak learning rate.
        seconds: Time limit; the learning-rate schedule ends with it.
        simulations: Learn from this many simulations in all, for slow forward models; by default fresh ones at each
            step.
        seed: Random seed.
        threads: Number of threads; by default all cores.
        resume: Continue an interrupted run from the state file beside the output.
    """
    settings = dict(locals())
    target = Path(output)
    check_output(target, (".safetensors",))
    numbers = {"layers": layers, "hidden": hidden, "batch": batch, "steps": steps}
    at_least(1, numbers if mcmc == "none" else numbers | {"mcmc_steps": mcmc_steps})
    at_least(0, {"components": components})
    if simulations is not None:
        at_least(1000, {"simulations": simulations})
    for name, value in (("lr", lr), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value} but must be positive.")
    state = target.with_suffix(".state.safetensors")
    if resume:
        existing_file(state, "training state file")
    found = load_problem(problem, seed=seed, threads=threads, gradients=mcmc == "mala")
    flow = conditional_snf(
        found.likelihood,
        found.prior,
        found.data_dim,
        couplings=couplings,
        layers=layers,
        hidden=hidden,
        components=components,
        mcmc=mcmc,
        mcmc_steps=mcmc_steps,
    )
    about: dict[str, object] = {
        "problem": problem,
        "problem_sha256": found.checksum,
        "parameters": len(found.names),
        "names": list(found.names),
        "seed": seed,
    }
    try:
        result = learn_posterior(
            flow,
            found.likelihood,
            found.prior,
            batch=batch,
            steps=steps,
            seconds=seconds,
            lr=lr,
            simulations=simulations,
            checkpoint=state,
            resume=resume,
            progress=True,
        )
    except NumericalError:
        save_posterior_model(target, flow, about)
        raise
    with torch.no_grad():
        rates = flow.walk(batch, found.likelihood.simulate(found.prior.sample(batch))).acceptance
    summary = {
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "validation": result.best,
        "stopped": result.stopped,
        "acceptance": list(rates.values()),
        "history": result.validation,
    }
    save_posterior_model(target, flow, about | summary)
    write_config(target.with_suffix(".yaml"), "train conditional-snf", settings)
    accepted = "".join(f"; {mcmc} accepts {100 * rate:.0f} %" for rate in rates.values())
    print(
        f"{target}: validation loss {result.best:.2f} nats after {result.steps} steps in {result.seconds:.0f} s "
        f"({result.stopped}){accepted}."
    )
    if result.stopped == "interrupted":
        print(
            f"Interrupted; {state} holds the state. Continue with: "
            f"{command_line('train conditional-snf', settings | {'resume': True})}"
        )
    else:
        state.unlink(missing_ok=True)
