"""Parsing, configuration files, and one sentence for every error."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

from patchflow.cli.benchmark import benchmark
from patchflow.cli.calibrate import calibrate
from patchflow.cli.config import expand_config
from patchflow.cli.demo import demo
from patchflow.cli.info import info
from patchflow.cli.messages import sentence
from patchflow.cli.posterior import train_conditional_snf
from patchflow.cli.reconstruct import reconstruct
from patchflow.cli.sample import sample
from patchflow.cli.simulate import simulate
from patchflow.cli.train import train_patch_nr
from patchflow.cli.train_denoisers import train_denoiser, train_pnn
from patchflow.cli.train_generative import train_patch_gan, train_patch_vae, train_student_t
from patchflow.cli.train_resolution import train_acnn
from patchflow.cli.train_rivals import train_epll, train_local_ar, train_wpp
from patchflow.cli.train_scan import train_fbp_unet, train_single_scan
from patchflow.cli.train_single_image import train_single_image
from patchflow.cli.train_unpaired import train_wpp_flow, train_wpp_net
from patchflow.cli.zero_shot import zero_shot
from patchflow.errors import InputError, NumericalError
from patchflow.io.checkpoint import library_version

# Commands by the words that call them; a list argument named here is positional.
_COMMANDS: dict[tuple[str, ...], tuple[Callable[..., None], str | None, str]] = {
    ("train", "patch-nr"): (train_patch_nr, "images", "learn a patchNR from one to six images"),
    ("train", "epll"): (train_epll, "images", "learn the Gaussian mixture of EPLL"),
    ("train", "student-t"): (train_student_t, "images", "learn a Student-t mixture of patches"),
    ("train", "patch-vae"): (train_patch_vae, "images", "learn a variational autoencoder"),
    ("train", "patch-gan"): (
        train_patch_gan,
        "images",
        "learn a generator of patches and its critic, for local-ar",
    ),
    ("train", "wpp"): (train_wpp, "images", "draw the patches of the Wasserstein patch prior"),
    ("train", "local-ar"): (
        train_local_ar,
        "images",
        "learn the critic of a local adversarial regulariser",
    ),
    ("train", "denoiser"): (
        train_denoiser,
        "images",
        "learn a denoiser of many noise levels, for plug and play",
    ),
    ("train", "pnn"): (train_pnn, "images", "learn a proximal network, for plug and play"),
    ("train", "fbp-unet"): (
        train_fbp_unet,
        "images",
        "learn a U-Net that corrects filtered backprojections of one scan",
    ),
    ("train", "single-scan"): (
        train_single_scan,
        "images",
        "learn a reconstructor for one scan from a few slices",
    ),
    ("train", "acnn"): (train_acnn, "images", "learn super-resolution from simulated pairs"),
    ("train", "wpp-net"): (
        train_wpp_net,
        "images",
        "learn super-resolution from measurements and a reference image",
    ),
    ("train", "wpp-flow"): (
        train_wpp_flow,
        "images",
        "learn samples of super-resolved images from measurements and a reference image",
    ),
    ("train", "single-image"): (
        train_single_image,
        "images",
        "learn a reconstructor for one measurement from a few images",
    ),
    ("train", "conditional-snf"): (
        train_conditional_snf,
        None,
        "learn the posteriors of all measurements of a simulator",
    ),
    ("reconstruct",): (reconstruct, "measurement", "reconstruct an image from a measurement"),
    ("zero-shot",): (zero_shot, "measurement", "super-resolve an image from nothing but itself"),
    ("simulate",): (simulate, "images", "simulate a measurement of an image or of CT slices"),
    ("sample",): (sample, "measurement", "sample the posterior of a measurement"),
    ("calibrate",): (
        calibrate,
        "images",
        "fit error bars to images or CT slices, or test the samples of a posterior model",
    ),
    ("demo",): (demo, None, "learn from one half of a photograph, super-resolve the other half"),
    ("benchmark",): (benchmark, "name", "rerun a table: ours beside the published numbers"),
    ("info",): (info, "model", "print what a model file says about itself"),
}
# Short flags and what they stand for.
_SHORT = {"-o": "--output", "-n": "--count"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; by default those of the process.

    Returns:
        0; 2 if something given cannot be used; 1 if a computation failed; 130 if interrupted with nothing to keep.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = _switched([_plain(_SHORT.get(word, word)) for word in given])
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    try:
        namespace = parser.parse_args(
            expand_config(arguments, {words: row[1] for words, row in _COMMANDS.items()})
        )
        words, leaf = _leaf(namespace)
        function, positional, _ = _COMMANDS[words]
        values = {key: value for key, value in vars(leaf).items() if key != "config"}
        if positional is not None and values[positional] in (None, []):
            del values[positional]
            if (
                inspect.signature(function).parameters[positional].default
                is inspect.Parameter.empty
            ):
                raise InputError(
                    f"The command needs {positional.upper()}; see patchflow {' '.join(words)} --help."
                )
        function(**values)
    except (InputError, argparse.ArgumentError) as error:
        print(f"patchflow: {_sentence(error, arguments)}", file=sys.stderr)
        return 2
    except NumericalError as error:
        print(f"patchflow: {_sentence(error, arguments)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("patchflow: interrupted before there was anything to keep.", file=sys.stderr)
        return 130
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="patchflow",
        exit_on_error=False,
        description="Inverse problems: images with priors learned from the patches of a few images, and posterior "
        "samples of the parameters of a simulator.",
        version=library_version(),
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    groups: dict[str, object] = {}
    for words, (function, positional, summary) in _COMMANDS.items():
        about = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0]
        leaf = ArgumentParser(exit_on_error=False, description=about, allow_abbrev=False)
        if positional == "images":
            leaf.add_argument(positional, nargs="*", type=str, metavar="IMAGE", help="image files")
        elif positional is not None:
            leaf.add_argument(positional, nargs="?", type=str, metavar=positional.upper())
        leaf.add_function_arguments(
            function, skip={positional} if positional else None, fail_untyped=True
        )
        leaf.add_argument(
            "--config",
            type=str,
            metavar="RUN.yaml",
            help="repeat a run: read arguments from this file",
        )
        if len(words) == 1:
            commands.add_subcommand(words[0], leaf, help=summary)
            continue
        if words[0] not in groups:
            group = ArgumentParser(exit_on_error=False, allow_abbrev=False)
            commands.add_subcommand(
                words[0], group, help="learn a model from images or from a simulator"
            )
            groups[words[0]] = group.add_subcommands(dest="model", required=True)
        groups[words[0]].add_subcommand(words[1], leaf, help=summary)  # pyright: ignore
    return parser


def _leaf(namespace: argparse.Namespace) -> tuple[tuple[str, ...], argparse.Namespace]:
    words = [namespace.command]
    leaf = getattr(namespace, namespace.command)
    if "model" in vars(leaf) and words[0] == "train":
        words.append(leaf.model)
        leaf = getattr(leaf, leaf.model)
    return tuple(words), leaf


def _plain(word: str) -> str:
    """A flag as it is declared: --field-of-view is --field_of_view."""
    name, sign, value = word.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name):
        return word
    return f"--{name[2:].replace('-', '_')}{sign}{value}"


def _switched(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``=true`` behind every switch that stands alone: --resume is --resume=true."""
    switches = {
        f"--{name}"
        for function, _, _ in _COMMANDS.values()
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation == "bool"
    }
    following = [*arguments[1:], ""]
    return [
        f"{word}=true" if word in switches and after not in ("true", "false") else word
        for word, after in zip(arguments, following, strict=False)
    ]


def _sentence(error: Exception, arguments: Sequence[str]) -> str:
    for words, (function, positional, _) in _COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            names = {*inspect.signature(function).parameters, "config", "help"} - {positional}
            return sentence(error, " ".join(words), sorted(names))
    return sentence(error, "", ())
