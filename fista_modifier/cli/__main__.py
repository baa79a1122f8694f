"""``python -m fista_modifier.cli``, which ``torchrun -m`` starts."""

import sys

from fista_modifier.cli import app

if __name__ == "__main__":
    sys.exit(app())
