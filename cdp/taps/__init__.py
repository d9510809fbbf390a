"""Taps: kernel nbd, device-mapper, qemu."""
