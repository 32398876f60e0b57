"""Turn a jsonl file into binidx; see --help."""

import sys

from rwkvpeft.cli.make_data import main

# worker processes import this file again
if __name__ == "__main__":
    sys.exit(main())
