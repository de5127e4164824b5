"""Records as pages and plots: a run or a simulation as one HTML page, an evaluation's curve, a sweep over mixtures."""
