"""`python -m fastvst` is the `fastvst` command."""

import sys

from fastvst.cli import main

if __name__ == "__main__":
    sys.exit(main())
