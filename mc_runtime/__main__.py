"""`python -m mc_runtime`: the command, where its script is not on the path."""

from mc_runtime.cli.main import main

if __name__ == "__main__":
    main()
