"""`python -m gptcli` is `gpt`."""

import sys

from gptcli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
