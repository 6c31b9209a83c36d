"""`python -m starling` is the command `starling`."""

import sys

from starling.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
