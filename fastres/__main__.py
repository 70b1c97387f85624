"""`python -m fastres` is the command `fastres`."""

from fastres.cli.main import main

if __name__ == "__main__":
    main()
