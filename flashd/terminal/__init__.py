"""What a person at a terminal needs, on any line: an editor, rows of whole words, and characters that are whole."""
