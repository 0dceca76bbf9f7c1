"""Emulated devices: registers compiled, behaviour in Python."""
