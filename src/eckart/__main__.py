"""`python -m eckart`."""

from eckart._cli import main

main()
