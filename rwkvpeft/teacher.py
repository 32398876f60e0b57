"""``python -m rwkvpeft.teacher``: store what a model says of data, for another to learn from; see --help."""

import sys

from rwkvpeft.cli.teacher import main

if __name__ == "__main__":
    sys.exit(main())
