"""Installed and imported as ternc.passes."""

if __name__ != "ternc.passes":
    raise ImportError("import this folder as ternc.passes")
