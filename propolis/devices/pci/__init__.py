"""PCI: configuration space, BARs, interrupt routing and MSI-X."""
