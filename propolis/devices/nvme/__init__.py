"""An NVMe 1.4 controller with one namespace."""
