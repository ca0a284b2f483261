"""``python -m compress``: the same as the script ``compress``."""

from compress.cli import main

if __name__ == "__main__":
    main()
