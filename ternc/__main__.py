"""`python -m ternc` is the `ternc` command."""

import sys

from ternc.cli import main

sys.exit(main())
