"""``python -m personaspace`` is the command ``personaspace``."""

import sys

from personaspace.cli import main

if __name__ == "__main__":
    sys.exit(main())
