"""``python -m fimprobe``."""

import sys

from fimprobe.cli.commands import main

sys.exit(main())
