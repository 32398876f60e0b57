"""Fine-tune an RWKV model; see --help."""

import sys

from rwkvpeft.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
