"""Training: resuming, stopping, keeping the best, and refusing what cannot be trained."""

import math

import pytest
import torch

from patchflow.energy import Energy
from patchflow.errors import InputError, NumericalError
from patchflow.fit import Fit, fit
from patchflow.learn import learn_patches, validation_patches
from patchflow.models import coupling_flow, patch_nr
from patchflow.palm_optimizer import Block, Palm


class Parabola(Energy):
    """Its mean over data is lowest where ``centre`` is their mean."""

    def __init__(self, start=0.0):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.tensor(start))

    def forward(self, x, condition=None):
        return 0.5 * (x[:, 0] - self.centre) ** 2


def flow_and_batches():
    torch.manual_seed(3)
    flow = coupling_flow(4, layers=2, hidden=8)
    return flow, lambda: torch.randn(16, 4) * 0.3


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_resumed_run_ends_at_the_same_parameters(average, tmp_path):
    settings = {"steps": 120, "average": average, "validate_every": 20, "lr": 3e-3}
    whole, batches = flow_and_batches()
    held = torch.randn(50, 4)
    fit(whole, batches, validate=lambda: float(whole(held).mean()), **settings)

    path = tmp_path / "state.safetensors"
    broken, batches = flow_and_batches()
    held_again = torch.randn(50, 4)
    assert torch.equal(held, held_again)
    calls = 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 71:
            raise KeyboardInterrupt
        return batches()

    def validate(flow):
        return lambda: float(flow(held).mean())

    first = fit(broken, interrupted, validate=validate(broken), checkpoint=path, **settings)
    assert (first.stopped, first.steps) == ("interrupted", 70)
    again, batches = flow_and_batches()
    torch.randn(1000)  # another state of the random numbers
    second = fit(again, batches, validate=validate(again), checkpoint=path, resume=True, **settings)
    assert second.stopped == "finished"
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Counting(Parabola):
    """Learns something without gradients: how often it was evaluated."""

    def __init__(self):
        super().__init__()
        self.register_buffer("evaluations", torch.zeros(()))

    def forward(self, x, condition=None):
        self.evaluations += 1
        return super().forward(x)


def test_a_resume_knows_what_was_learned_without_gradients(tmp_path):
    path = tmp_path / "state.safetensors"
    calls = 0

    def batches():
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return torch.ones(4, 1)

    fit(Counting(), batches, steps=20, checkpoint=path)
    again = Counting()
    fit(again, batches, steps=20, checkpoint=path, resume=True)
    assert float(again.evaluations) == 20


def test_interrupted_run_keeps_its_best_state():
    energy = Parabola()
    calls = 0

    def batches():
        nonlocal calls
        calls += 1
        if calls == 300:
            raise KeyboardInterrupt
        # The data run away after a while, and validation sees it.
        return torch.full((8, 1), 1.0 if calls < 150 else 9.0)

    result = fit(
        energy,
        batches,
        steps=1000,
        lr=0.05,
        schedule="constant",
        validate=lambda: float(energy(torch.ones(1, 1))),
        validate_every=10,
    )
    assert result.stopped == "interrupted"
    assert abs(float(energy.centre) - 1) < 0.1
    assert result.best == min(value for _, value in result.validation)
    assert not energy.centre.requires_grad


def test_patience_and_budget_stop():
    energy = Parabola()
    rising = iter(range(1000))
    result = fit(
        energy,
        lambda: torch.ones(4, 1),
        steps=1000,
        validate=lambda: float(next(rising)),
        validate_every=5,
        patience=3,
    )
    assert (result.stopped, result.steps) == ("patience", 20)
    result = fit(Parabola(), lambda: torch.ones(4, 1), steps=10**9, budget=0.3)
    assert result.stopped == "budget"
    assert 0.2 < result.seconds < 30


def test_average_is_of_the_parameters():
    """The moving average, computed again from the trajectory."""
    energy, seen = Parabola(), []

    def batches():
        seen.append(float(energy.centre.detach()))
        return torch.ones(4, 1)

    fit(energy, batches, steps=40, lr=0.1, average=0.8, schedule="constant")
    reference = Parabola()
    fit(reference, lambda: torch.ones(4, 1), steps=40, lr=0.1, schedule="constant")
    average = 0.0
    for step, value in enumerate([*seen[1:], float(reference.centre)], 1):
        average += (1 - min(0.8, (1 + step) / (10 + step))) * (value - average)
    assert float(energy.centre) == pytest.approx(average, abs=1e-12)


def test_nan_stops_with_advice_and_keeps_the_best():
    energy = Parabola()
    calls = 0

    def batches():
        nonlocal calls
        calls += 1
        return torch.full((4, 1), 1.0 if calls <= 50 else math.nan)

    with pytest.raises(NumericalError, match="nan at step 50.*smaller lr than 0.05"):
        fit(
            energy,
            batches,
            steps=100,
            lr=0.05,
            validate=lambda: float(energy(torch.ones(1, 1))),
            validate_every=10,
        )
    assert math.isfinite(float(energy.centre))
    assert float(energy.centre) > 0.1


def test_long_gradients_are_shortened():
    def step(clip):
        energy = Parabola()
        fit(
            energy,
            lambda: torch.full((4, 1), 3.0),
            steps=1,
            lr=0.1,
            schedule="constant",
            clip=clip,
            optimizer=lambda parameters: torch.optim.SGD(parameters.values(), lr=1.0),
        )
        return energy.centre.item()

    assert step(None) == step(4.0) > 0  # the gradient is 3
    assert step(0.5) == pytest.approx(step(None) / 6)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="time limit is 0"):
        fit(Parabola(), lambda: torch.ones(4, 1), steps=1, budget=0.0)
    with pytest.raises(InputError, match="largest norm of gradients is 0"):
        fit(Parabola(), lambda: torch.ones(4, 1), steps=1, clip=0.0)
    with pytest.raises(InputError, match="PALM has no gradients to shorten"):
        fit(
            Parabola(),
            lambda: torch.ones(4, 1),
            steps=1,
            clip=1.0,
            optimizer=lambda parameters: Palm([Block("all", list(parameters.values()))]),
        )
    for steps, lr in ((0, 0.1), (1, -0.1), (1, math.nan)):
        with pytest.raises(InputError, match=f"Got {steps} steps at a learning rate of {lr}"):
            fit(Parabola(), lambda: torch.ones(4, 1), steps=steps, lr=lr)
    with pytest.raises(InputError, match="Nothing is trainable"):
        fit(Parabola().requires_grad_(False), lambda: torch.ones(4, 1), steps=1)
    with pytest.raises(InputError, match="nothing to resume from"):
        fit(Parabola(), lambda: torch.ones(4, 1), steps=1, resume=True)
    with pytest.raises(InputError, match=r"missing\.safetensors"):
        fit(
            Parabola(),
            lambda: torch.ones(4, 1),
            steps=1,
            resume=True,
            checkpoint=tmp_path / "missing.safetensors",
        )
    with pytest.raises(InputError, match="'linear'; use"):
        fit(Parabola(), lambda: torch.ones(4, 1), steps=1, schedule="linear")


def texture(rows=60, columns=50):
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    wave = 0.5 + 0.2 * torch.sin(0.7 * i) * torch.cos(0.4 * j)
    return (wave + 0.01 * torch.randn(rows, columns))[None, None]


def test_learning_prefers_its_own_texture():
    prior = patch_nr(size=4, layers=3, hidden=32)
    result = learn_patches(prior, [texture()], steps=150, batch=128, lr=3e-3)
    own, foreign = texture(), torch.rand(1, 1, 60, 50)
    assert float(prior(own)) < float(prior(foreign))
    assert result.validation[-1][1] < result.validation[0][1]
    # The same held-out patches whatever the seed.
    torch.manual_seed(1)
    first = validation_patches([own], 4)
    torch.manual_seed(2)
    assert torch.equal(first, validation_patches([own], 4))


def test_smoothing_learns_the_density_of_noisy_patches():
    """Of one constant patch the noisy ones are Gaussian: entropy and denoised image are known."""
    noise, flat = 0.1, torch.full((1, 1, 12, 12), 0.3)
    prior = patch_nr(size=2, layers=2, hidden=16, smoothing=noise)
    held = validation_patches([flat], 2, noise=noise)
    assert float(held.std()) == pytest.approx(noise, rel=0.1)
    assert torch.equal(held, validation_patches([flat], 2, noise=noise))
    result = learn_patches(prior, [flat], [flat], steps=300, batch=128, lr=1e-2)
    entropy = 4 * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(noise))
    assert result.best == pytest.approx(entropy, abs=0.3)
    noisy = flat + noise * torch.randn_like(flat)
    cleaned = prior.denoise(noisy)
    assert float((cleaned - flat).square().mean()) < 0.3 * float((noisy - flat).square().mean())
    with pytest.raises(InputError, match="smoothing -1.0"):
        patch_nr(smoothing=-1.0)


def test_learning_refuses_what_does_not_fit():
    prior = patch_nr(size=4, layers=1, hidden=8)
    with pytest.raises(InputError, match="3 channels but the model was made for 1"):
        learn_patches(prior, [torch.rand(1, 3, 20, 20)], steps=1)
    with pytest.raises(InputError, match=r"held-out fraction is 0.9"):
        learn_patches(prior, [texture()], holdout=0.9, steps=1)
    with pytest.raises(InputError, match="too small to hold out"):
        learn_patches(prior, [texture(7, 30)], steps=1)


def test_paper_preset_is_the_published_procedure(monkeypatch):
    seen = {}

    def spy(energy, batches, **settings):
        seen.update(settings, batch=batches.batch)
        return Fit(0, [], [], 0.0, 0.0, "finished")

    monkeypatch.setattr("patchflow.learn.fit", spy)
    learn_patches(patch_nr(preset="paper"), [texture()], preset="paper")
    published = {"steps": 750_000, "batch": 32, "lr": 1e-4, "schedule": "constant"}
    assert seen.items() >= published.items()
    assert sum(p.numel() for p in patch_nr(preset="paper").parameters()) == 2_908_520
