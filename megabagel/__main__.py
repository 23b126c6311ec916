"""`python -m megabagel`."""

import sys

from megabagel.cli import main

if __name__ == "__main__":
    sys.exit(main())
