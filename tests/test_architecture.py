"""Floors, wings, circles, files and forbidden constructs of the sources, read without importing them.

A checker takes the folder of the package and returns one sentence for each fault.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "patchflow"

# Each string is a wing: a folder, a file, or files that belong together. See docs/architecture.md.
FLOORS = [
    ["errors"],
    ["energy", "numerics", "io", "records", "table", "solution", "progress"],
    ["chains", "priors", "problems", "networks", "metrics", "sample_metrics"],
    [
        "models",
        "denoiser_models",
        "flow_models",
        "image_models",
        "patch_models",
        "posterior_models",
        "resolution_models",
        "crop_posterior",
        "scan_network",
        "tomography_models",
        "variation_problem",
        "fit",
        "fixed_points",
        "solve",
        "splitting",
        "saddle",
        "palm",
        "palm_optimizer",
        "training_run",
        "generative_models",
    ],
    [
        "learn",
        "learn_critic learn_gan",
        "learn_denoiser",
        "learn_scan",
        "learn_mixture",
        "learn_pairs learn_wpp_net learn_wpp_flow",
        "learn_student",
        "learn_posterior",
        "learn_reference",
        "learn_single_image",
        "reconstruct",
        "uncertainty",
    ],
    ["methods tomography_methods", "zero_shot"],
    ["papers", "volumes", "report report_html figures panels posterior_report calibration_plots"],
    ["cli __main__"],
]
OPEN_FLOORS = {1, 3}  # here a wing may import its neighbours; on every other floor it may not
FOLDERS_OF_STRANGERS = {"reconstruct"}  # here no file imports another
MOST_LINES = 300
DRAWERS = {"util", "utils", "helper", "helpers", "common", "misc"}
# What is neither imported nor used, nor anything inside it.
RUNS_DATA = ["pickle", "torch.load", "torch.save", "eval", "exec", "os.system"]
LOADS_BY_NAME = ["__import__", "importlib.util", "importlib.import_module"]
NETWORK = ["urllib", "requests", "socket", "http"]
FORBIDDEN = [*RUNS_DATA, *LOADS_BY_NAME, *NETWORK, "hasattr"]
ALLOWED = {("cli/problems.py", "importlib.util")}  # it runs the problem file that the user names


def read(root):
    """The syntax tree of each file, by its path below the package."""
    paths = sorted(root.rglob("*.py"))
    return {p.relative_to(root).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def module_name(file):
    return file.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def nodes(tree, when_loaded):
    """All nodes of the tree; if `when_loaded`, without functions and `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not (when_loaded and later):
            yield from nodes(child, when_loaded)


def imports(root, when_loaded=False):
    """Triples of a file, a line and the module of the package imported there; "" is its face."""
    trees = read(root)
    modules = {module_name(file) for file in trees}
    for file, tree in trees.items():
        for node in nodes(tree, when_loaded):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                folder = [root.name, *file.split("/")][: -node.level] if node.level else []
                start = ".".join([*folder, *filter(None, [node.module])])
                names = [f"{start}.{alias.name}" for alias in node.names]
            for name in names:
                first, *rest = name.split(".")
                while rest and ".".join(rest) not in modules:
                    rest.pop()
                if first == root.name:
                    yield file, node.lineno, ".".join(rest)


def place(name):
    """The floor of a module and its wing, (None, None) if the table does not know it."""
    first = name.split(".")[0]
    known = [(i, w) for i, wings in enumerate(FLOORS) for w in wings if first in w.split()]
    return known[0] if known else (None, None)


def check_floors(root):
    for file in read(root):
        if file != "__init__.py" and place(module_name(file))[0] is None:
            yield f"{file} has no floor: add it to FLOORS in {Path(__file__).name}."
    for file, line, name in imports(root):
        here, there = place(module_name(file))[0], place(name)[0]
        if file != "__init__.py" and not name:
            yield f"{file}:{line} imports the package's face: import the module that defines the name."
        elif here is not None and there is not None and here < there:
            yield f"{file}:{line} on floor {here} imports {name} from floor {there}, above it."


def check_wings(root):
    for file, line, name in imports(root):
        (here, wing), (there, other) = place(module_name(file)), place(name)
        if here is not None and here == there and wing != other and here not in OPEN_FLOORS:
            yield f"{file}:{line} imports {name}, a neighbouring wing of floor {here}."
        if wing == other and wing in FOLDERS_OF_STRANGERS:
            yield f"{file}:{line} imports {name}, but the files in {wing}/ do not import each other."


def check_circles(root):
    graph = {}
    for file, _, name in imports(root, when_loaded=True):
        graph.setdefault(module_name(file), set()).add(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{' imports '.join(reversed(error.args[1]))}: a circle."


def check_files(root):
    for file in read(root):
        lines = len((root / file).read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            yield f"{file} has {lines} lines: split it, at most {MOST_LINES} are allowed."
        if drawers := DRAWERS & set(module_name(file).split(".")):
            yield f"{file} is a drawer ({min(drawers)}): name it after what is in it."


def uses(tree):
    """Pairs of a line and a dotted name imported or used there, `import a as b` undone."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            start = ""
            if isinstance(node, ast.ImportFrom):
                start = "." * node.level + f"{node.module}."
            full |= {a.asname or a.name: start + a.name for a in node.names}
            yield from ((node.lineno, start + a.name) for a in node.names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, *rest = ast.unparse(node).split(".")
            yield node.lineno, ".".join([full.get(first, first), *rest])


def forbidden(root):
    """Triples of a file, a line and the forbidden thing on it."""
    for file, tree in read(root).items():
        for line, name in uses(tree):
            yield from ((file, line, t) for t in FORBIDDEN if f"{name}.".startswith(f"{t}."))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield file, node.lineno, "import *"
            if isinstance(node, ast.arguments) and node.kwarg:
                yield file, node.kwarg.lineno, f"**{node.kwarg.arg}"
            switch = isinstance(node, ast.keyword) and node.arg in {"shell", "allow_pickle"}
            if switch and ast.unparse(node.value) != "False":
                yield file, node.value.lineno, ast.unparse(node)


def check_forbidden(root):
    for file, line, thing in sorted(set(forbidden(root))):
        if (file, thing) not in ALLOWED:
            yield f"{file}:{line} uses {thing}, which this package does without."


CHECKS = [check_floors, check_wings, check_circles, check_files, check_forbidden]


@pytest.mark.parametrize("check", CHECKS)
def test_sources_keep_the_rules(check):
    faults = list(check(SOURCE))
    assert not faults, "\n" + "\n".join(faults)


def test_every_exception_is_still_needed():
    assert {(file, thing) for file, _, thing in forbidden(SOURCE)} >= ALLOWED


SOUND = {
    "__init__.py": "from patchflow.fit import fit as fit",
    "errors.py": "",
    "table.py": "from patchflow.io.atomic import write",
    "io/atomic.py": "import safetensors.torch\nfrom ..errors import E\nsafetensors.torch.load(b'')",
    "chains/kernel.py": "",
    "chains/flow.py": "from .kernel import Kernel",
    "priors/patch.py": "from patchflow.errors import E\nmodel.eval()",
    "fit.py": "from patchflow import errors, table\nfrom patchflow.chains import flow",
    "solve.py": "from patchflow.fit import fit\ndraw(**line)",
    "reconstruct/one.py": "from patchflow import solve",
    "reconstruct/two.py": "from patchflow.priors.patch import PatchPrior",
    "papers/paper.py": "from patchflow.reconstruct.one import one",
    "report.py": "import patchflow.figures",
    "figures.py": "def f():\n    import patchflow.report",
    "cli/__init__.py": "from patchflow.cli.main import main",
    "cli/main.py": "if TYPE_CHECKING:\n    import patchflow.cli\nload(allow_pickle=False)",
    "cli/problems.py": "import importlib.util\nimportlib.util.find_spec('x')" + "\n" * 298,
}
# Each line is a fault; its comment is what the sentence names.
FORBIDDEN_LINES = """import pickle  # pickle
from pickle import loads  # pickle
torch.load(file)  # torch.load
from torch import load as read  # torch.load
import torch as t; t.save(x)  # torch.save
eval(text)  # eval
exec(text)  # exec
import importlib.util  # importlib.util
hasattr(x, 'y')  # hasattr
os.system('ls')  # os.system
import urllib.request  # urllib
import requests  # requests
import socket as s  # socket
from http.client import HTTPConnection  # http
def f(x, **kwargs): ...  # **kwargs
g = lambda **options: 0  # **options
from math import *  # import *
run('ls', shell=True)  # shell=True
np.load(file, allow_pickle=True)  # allow_pickle=True""".splitlines()
PLANTED = [
    (check_floors, "errors.py", "import patchflow.fit", ":1 on floor 0 imports fit from floor 3"),
    (check_floors, "io/atomic.py", "from .. import solve", ":1 on floor 1 imports solve"),
    (check_floors, "errors.py", "def f():\n    import patchflow.fit", ":2 on floor 0 imports fit"),
    (check_floors, "cli/main.py", "from patchflow import learn", ":1 imports the package's face"),
    (check_floors, "novel.py", "", " has no floor: add it to FLOORS"),
    (check_wings, "priors/patch.py", "import patchflow.chains.flow", ":1 imports chains.flow, a"),
    (check_wings, "report.py", "import patchflow.papers.paper", ":1 imports papers.paper, a"),
    (check_wings, "reconstruct/two.py", "from .one import x", ":1 imports reconstruct.one, but"),
    (check_circles, "chains/kernel.py", "from . import flow", "chains.kernel imports chains.flow"),
    (check_circles, "fit.py", "if x:\n    import patchflow.solve", "fit imports solve"),
    (check_files, "fit.py", "x = 1\n" * 301, " has 301 lines: split it"),
    (check_files, "io/utils.py", "", " is a drawer (utils)"),
    (check_files, "helpers/io.py", "", " is a drawer (helpers)"),
    *((check_forbidden, "fit.py", s, f":1 uses {s.split('# ')[1]},") for s in FORBIDDEN_LINES),
]


def faults_of(check, folder, files):
    for name, text in files.items():
        path = folder / "patchflow" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(check(folder / "patchflow"))


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_package_has_no_fault(check, tmp_path):
    assert faults_of(check, tmp_path, SOUND) == []


@pytest.mark.parametrize(("check", "file", "text", "sentence"), PLANTED)
def test_a_planted_fault_is_reported(check, file, text, sentence, tmp_path):
    faults = faults_of(check, tmp_path, SOUND | {file: text})
    assert len(faults) == 1, faults
    assert module_name(file) in module_name(faults[0].split(":")[0]), faults
    assert sentence in faults[0], faults
