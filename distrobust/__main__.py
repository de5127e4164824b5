"""`python -m distrobust`, and what torchrun starts."""

from distrobust.cli import main

if __name__ == "__main__":  # torchrun's workers import this module again
    main()
