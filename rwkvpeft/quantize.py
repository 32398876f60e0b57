"""``python -m rwkvpeft.quantize``: write a model with packed weights; see --help."""

import sys

from rwkvpeft.cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
