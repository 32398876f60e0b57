"""``python -m rwkvpeft.generate``: continue a text or hold a dialogue; see --help."""

import sys

from rwkvpeft.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
