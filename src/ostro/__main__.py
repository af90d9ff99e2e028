"""`python -m ostro`: the same as the `ostro` command."""

from ostro.cli import main

if __name__ == "__main__":
    main()
