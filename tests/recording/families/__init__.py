"""One file per site family with its ``CASES``; every case passes the common suite of ``test_families.py``."""
