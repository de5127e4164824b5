"""Every exception a user can meet.

    DistrobustError            exit code 2: one line says what, where, got, wanted, what to try
    ├── ConfigError            an impossible or unknown configuration value, or values that exclude each other
    ├── DataError              a data set that cannot be read as images or texts, and labels
    ├── ModelError             weights that do not fit the model, or a model that does not fit the task
    ├── CheckpointError        a run directory or checkpoint that cannot be continued from
    ├── CodecError             a payload that is truncated, corrupted or from another layout
    ├── CommError              another rank is gone, or did something different
    ├── LabError               hosts on a slow link cannot be made here, or a program in one of them failed
    └── DivergedError          too many non-finite steps in a row, ranks whose parameters differ, or simulated rounds
                               in which no client's update counts

Programming errors (a wrong argument type inside the package) stay ordinary Python exceptions.
"""


class DistrobustError(Exception):
    """Base of all errors whose text is meant for a user. The text is one line."""


class ConfigError(DistrobustError):
    """A configuration value is unknown, out of range or contradicts another one."""


class DataError(DistrobustError):
    """A data set is missing, empty or not in the documented layout."""


class ModelError(DistrobustError):
    """Weights and model do not match in names or shapes, or the model cannot do what is asked of it."""


class CheckpointError(DistrobustError):
    """A run directory or checkpoint is damaged or belongs to another configuration."""


class CodecError(DistrobustError):
    """A received payload does not decode; nothing of it was applied."""


class CommError(DistrobustError):
    """A collective failed: a peer died, timed out or disagreed."""


class LabError(DistrobustError):
    """Network namespaces or traffic shaping are not available, or what ran in a host failed."""


class DivergedError(DistrobustError):
    """Training cannot go on: non-finite gradients step after step, replicas that differ, rounds without an update."""
