"""`python -m peftctl`, and the entry point of the `peftctl` command."""

from peftctl.cli import main

if __name__ == "__main__":
    main()
