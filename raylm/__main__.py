"""`python -m raylm`."""

from raylm.cli import main

main()
