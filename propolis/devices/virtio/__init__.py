"""Virtio devices (OASIS virtio 1.2) on the PCI transport, modern interface only."""
