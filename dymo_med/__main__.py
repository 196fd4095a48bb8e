"""`python -m dymo_med`."""

from dymo_med.cli import main

main()
