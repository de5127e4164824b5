"""The slow-link lab: several hosts on one machine, joined by links of a chosen bandwidth.

`hosts` makes and changes them, `namespaces` is how Linux is asked for it, `link` is a bandwidth, `counters` what went
over the wire.
"""
