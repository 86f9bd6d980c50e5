"""Conversion between the proto messages and the dataclasses of ``types``."""
