"""flashd: answers prompts on a small board with a language model larger than its RAM."""

import os

__version__ = "0.1.0"

# From 1.29 on onnxruntime's Linux wheels report every session to their maker unless this is set before they are
# imported, and keep a database for that in the user's cache folder. An appliance tells nobody anything.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
