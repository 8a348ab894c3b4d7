"""`python -m clients.cli` is `corral`."""

from clients.cli.main import main

if __name__ == "__main__":
    main()
