"""Many simulated clients, in rounds, with the compressor of the communication hook and links of a virtual clock.

settings.py      the configuration of a simulation
draws.py         random numbers as a function of (seed, purpose, round, client, ...)
partition.py     which rows of a data set are a client's
network.py       a model as stacked parameter vectors of a cohort; its gradients by hand or by torch.func.vmap
projected.py     gradients without back-propagation (tpSGD)
batches.py       which rows a client takes in which local step
local.py         what a client does: local steps
attacked.py      adversarial examples for local adversarial training
personal.py      a model of its own for every client (FTFA, RTFA)
server.py        what the server does with the mean of the updates
coding.py        updates <-> messages, the same bytes as the hook's
rows.py          a vector per client that survives being offline: in memory, then in memory-mapped files
links.py         bandwidth, latency, compute speed; traces from CSV
availability.py  which clients can be reached in a round
timeline.py      a round on the virtual clock: who arrives, who is late, what it costs
deadline.py      one that nobody can meet
work.py          what a cohort does in a round, wherever it is done
simulate.py      a round
totals.py        what rounds add up to
patience.py      when there is no point in going on
evaluation.py    accuracy over all rows, and for one client and another
rounds.py        all rounds
buffered.py      asynchronous ones (FedBuff)
served.py        records for Prometheus
checkpoint.py    everything between two rounds as one file
command.py       a configuration file -> a run directory and lines for the terminal
"""
