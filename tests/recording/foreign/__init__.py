"""Folders in the exact key layout of CoIN, MCITlib and Prism, with synthetic weights, and each one's equation."""
