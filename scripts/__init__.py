"""The commands that a user runs beside train.py."""
