"""`python -m dynanet` is the command line."""

import sys

from dynanet.cli.commands import main

sys.exit(main())
