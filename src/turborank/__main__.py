"""``python -m turborank``: the command, for launchers that start modules."""

from turborank.cli.main import main

if __name__ == "__main__":
    main()
