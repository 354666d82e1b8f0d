"""The version, for the package and for files that say what wrote them."""

VERSION = "0.1.0"
