"""`python -m infer ...` is `lorabooth generate ...`."""

import sys

from lorabooth.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
