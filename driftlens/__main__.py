"""``python -m driftlens``: the command line, for launchers that start modules."""

from driftlens.cli.main import main

if __name__ == "__main__":
    main()
