"""python -m flashd"""

import sys

from flashd.cli.main import main

sys.exit(main())
