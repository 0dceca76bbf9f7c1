"""The HTTP API of a VM and of the daemon."""
