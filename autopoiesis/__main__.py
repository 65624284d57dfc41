"""`python -m autopoiesis` is the command line."""

from autopoiesis.cli import main

main()
