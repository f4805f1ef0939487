"""`python -m trifold`."""

from trifold.cli import main

main()
