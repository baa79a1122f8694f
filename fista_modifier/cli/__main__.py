"""``python -m fista_modifier.cli``, as ``torchrun -m`` starts it."""

import sys

from fista_modifier.cli import app

if __name__ == "__main__":
    sys.exit(app())
