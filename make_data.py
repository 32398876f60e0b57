"""Turn a jsonl file into binidx; see --help."""

import sys

from rwkvpeft.cli.make_data import main

sys.exit(main())
