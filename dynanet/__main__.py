"""`python -m dynanet` is the command line."""

import sys

from dynanet.cli import main

sys.exit(main())
