"""`python -m vistune`: the same as the command `vistune`."""

from vistune.cli import main

if __name__ == "__main__":
    main()
