"""Devices of the board, one file each (layer 2)."""
