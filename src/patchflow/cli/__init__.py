"""The command line: each command reads files, calls one verb, and writes files."""

from patchflow.cli.main import main as main
