"""The version, said once: the package, the build and the built library's record all read it here."""
__version__ = "0.1.0"
