"""Fine-tune an RWKV model; see --help."""

import sys

from rwkvpeft.cli.train import main

sys.exit(main())
