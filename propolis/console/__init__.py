"""The console room: what the guest printed, and the people who read it and type."""
