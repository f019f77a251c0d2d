"""The version of the package that is installed."""

from importlib import metadata

try:
    __version__ = metadata.version("pyablate")
except metadata.PackageNotFoundError:  # sources on the path, not installed
    __version__ = "0+unknown"
