"""``python -m rwkvpeft.plan``: what a training run would need; see --help."""

import sys

from rwkvpeft.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
