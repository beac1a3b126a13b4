"""python -m flashd"""

import sys

from flashd.cli import main

sys.exit(main())
