"""Propolis: an asyncio-native virtual machine monitor with compiled vCPU loops.

Importing this package loads nothing compiled.
"""

__version__ = "0.1.0"
