"""flashd chat: a talk, the terminal or pipe it is held at, and its answers as they come."""
