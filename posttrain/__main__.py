"""`python -m posttrain`, the same as `posttrain`."""

import sys

from posttrain.cli import main

sys.exit(main())
