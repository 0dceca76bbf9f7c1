"""Hypervisor back ends: KVM on Linux, replay everywhere, bhyve on illumos."""
