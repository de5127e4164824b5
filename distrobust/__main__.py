"""`python -m distrobust`, and what torchrun starts."""

from distrobust.cli import main

main()
