"""Fold an adapter into its base model; see --help."""

import sys

from rwkvpeft.cli.merge import main

sys.exit(main())
