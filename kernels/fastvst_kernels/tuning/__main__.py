"""`python -m fastvst_kernels.tuning`: write the tile table of this machine's GPU."""

import sys

from fastvst_kernels.tuning.tune import main

if __name__ == "__main__":
    sys.exit(main())
