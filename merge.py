"""Fold an adapter into its base model; see --help."""

import sys

from rwkvpeft.cli.merge import main

if __name__ == "__main__":
    sys.exit(main())
