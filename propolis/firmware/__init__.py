"""What a guest finds before its first instruction: direct kernel boot and the ACPI tables."""
