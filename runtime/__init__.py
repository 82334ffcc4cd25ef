"""Installed and imported as ternc.runtime."""

if __name__ != "ternc.runtime":
    raise ImportError("import this folder as ternc.runtime")
