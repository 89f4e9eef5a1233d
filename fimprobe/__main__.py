"""``python -m fimprobe``."""

import sys

from fimprobe.cli import main

sys.exit(main())
