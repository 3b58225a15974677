"""`python -m minirec_pl` is the `minirec` command."""

import sys

from minirec_pl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
