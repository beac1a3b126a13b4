"""What hears: a microphone, a recogniser, and a button that is held meanwhile."""
