"""What the parser refuses is told in one sentence: the flag, its value, what it must be."""

import re

import pytest

from patchflow.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "reconstruct y.npy --problem=denoising --method=tvv",
            r"--method is 'tvv' but must be one of patchnr, .*, tv, .*, auto \(did you mean tv\?\)\.",
        ),
        (
            "reconstruct y.npy --problem=denoising --scale=four",
            "--scale is 'four' but must be a whole number, such as 4.",
        ),
        (
            "train pnn y.png --seconds=soon",
            "--seconds is 'soon' but must be a number, such as 0.1.",
        ),
        (
            "train fbp-unet y.tif --widths=3,4",
            r"--widths is '3,4' but must be a list, such as \[32,64\]\.",
        ),
        (
            "train patch-nr y.png --resume=maybe",
            "--resume is 'maybe' but must be true or false.",
        ),
        (
            "train pnn y.png --activation=step",
            "--activation is 'step' but must be one of relu, elu, shrink, clip, tanh.",
        ),
        (
            "reconstruct y.npy --problem=denoising --methd=tv",
            r"There is no flag --methd here \(did you mean --method\?\); see patchflow reconstruct --help.",
        ),
        (
            "simulate y.png --field-of-vew 0.3",
            r"There is no flag --field-of-vew here \(did you mean --field-of-view\?\); see patchflow simulate --help.",
        ),
        (
            "reconstruct --measurement=y.npy --problem=denoising",
            r"There is no flag --measurement here; see patchflow reconstruct --help.",
        ),
        (
            "reconstruct y.npy --problem=denoising --confg=run.yaml",
            r"There is no flag --confg here \(did you mean --config\?\); see patchflow reconstruct --help.",
        ),
        (
            "reconstruct y.npy z.npy --problem=denoising",
            "'z.npy' is one argument too many, or neither true nor false for the flag before it; "
            "see patchflow reconstruct --help.",
        ),
        ("reconstruct y.npy", "--problem is required; see --help."),
        ("reconstruct y.npy --seed=", "--seed is '' but must be a whole number, such as 4."),
        (
            "reconstruct y.npy --noise",
            "--noise has no value; give one, behind = if it begins with a dash, or leave it out.",
        ),
        ("reconstruct y.npy --range -5:5", "--range has no value; give one, behind = .*"),
        ("reconstruct y.npy -o", "--output has no value; give one, .*"),
        (
            "recon y.npy",
            r"There is no command 'recon'; use one of train, reconstruct, .*, info \(did you mean reconstruct\?\)\.",
        ),
        (
            "train patchnr y.png",
            r"There is no model 'patchnr'; use one of patch-nr, .* \(did you mean patch-nr\?\)\.",
        ),
    ],
)
def test_refusals_of_the_parser(arguments, said, capsys):
    assert main(arguments.split()) == 2
    found = capsys.readouterr().err.strip()
    assert re.fullmatch(f"patchflow: {said}", found), found
