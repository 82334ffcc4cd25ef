"""Modules that hold packed ternary weights instead of floating-point ones."""
