"""Host resources behind devices."""
