"""`python -m atomtx` is `atomtx`."""

from .cli import main

if __name__ == "__main__":
    main()
