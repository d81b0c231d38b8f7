"""`python -m lorabooth` is `lorabooth`."""

import sys

from lorabooth.cli import main

if __name__ == "__main__":
    sys.exit(main())
