"""``python -m rwkvpeft.evaluate``: loss and perplexity on a data file; see --help."""

import sys

from rwkvpeft.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
