"""``python -m patchflow`` is the command ``patchflow``."""

import sys

from patchflow.cli import main

sys.exit(main())
