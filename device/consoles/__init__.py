"""Consoles at a serial line: one for a person, one for a microcontroller."""
