"""``python -m rwkvpeft.convert``: adapters to and from Hugging Face peft's format; see --help."""

import sys

from rwkvpeft.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
