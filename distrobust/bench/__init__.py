"""Does compression pay on this link? Step times, bytes and the crossover, measured on this machine.

A room of its own that nothing but the command line imports. `lab` makes hosts joined by a slow link on one machine,
`launch` starts a function in each of them, `step` and `crossover` are what `distrobust bench` prints.
"""
