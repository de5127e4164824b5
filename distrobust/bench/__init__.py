"""Does compression pay on this link? Step times, bytes and the crossover, measured on this machine.

A room of its own that nothing but the command line imports. `launch` starts a function in each host of the lab, `step`
and `crossover` are what `distrobust bench` prints.
"""
