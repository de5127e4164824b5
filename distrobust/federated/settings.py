"""The configuration of a simulation: a YAML file of its own, as config.py's in form, defaults and error messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distrobust import config as configuration
from distrobust.config import RunConfig
from distrobust.config.section import Budget, Count, Density, Positive, Section, Share


class SimulatedDataConfig(Section):
    path: Path
    """Directory with train.parquet and test.parquet in the Hugging Face image layout (sharded names work too)."""
    image_column: str | None = None
    """null: `image`, `img`, or the only column of encoded images."""
    label_column: str | None = None
    """null: `label`, or its usual relatives."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training rows that no client has, for accuracy during the run. The test file is for the end only."""


class ClientsConfig(Section):
    registered: Count | None = 100
    """How many there are. null with partition client: as many as the column has values."""
    per_round: Count = 10
    """Whose updates a round waits for."""
    partition: Literal["iid", "dirichlet", "shards", "group", "client"] = "iid"
    """dirichlet: class shares drawn with `alpha`; shards: rows of `shards` classes each; group: every client's rows
    have one value of `column`; client: the values of `column` are the clients."""
    rows: Count | None = None
    """Rows a client draws for itself, so that clients may share rows; null: every row belongs to exactly one client."""
    alpha: Positive = 0.5
    """dirichlet only: concentration; large is IID, small is one class a client."""
    shards: Count = 2
    """shards only: pieces (or, with `rows`, classes) a client gets."""
    column: str | None = None
    """group and client only: column of the Parquet files."""

    @model_validator(mode="after")
    def _fits(self) -> ClientsConfig:
        needs_column = self.partition in ("group", "client")
        if needs_column != (self.column is not None):
            raise ValueError(f"column goes with partition group or client, got partition {self.partition}")
        if needs_column and self.rows is not None:
            raise ValueError(f"rows goes with partition iid, dirichlet or shards, got partition {self.partition}")
        if self.registered is None and self.partition != "client":
            raise ValueError("registered may be null with partition client only; wanted a number")
        if self.registered is not None and self.per_round > self.registered:
            raise ValueError(
                f"per_round is {self.per_round} of {self.registered} registered clients; wanted at most as many"
            )
        return self


class LocalConfig(Section):
    epochs: Count = 1
    """Passes of a client over its rows."""
    steps: Count | None = None
    """Local steps instead of epochs."""
    batch_size: Count | None = 16
    """null: all rows of the client in one batch. The last batch of an epoch may be smaller."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """A fresh one in every round; adamw with betas 0.9 and 0.999, as DiLoCo's clients."""
    rate: Positive = 0.1
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Coupled for sgd, decoupled for adamw."""
    gradients: Literal["backpropagation", "target_projection"] = "backpropagation"
    """target_projection: tpSGD, each layer towards a random projection of the label; mlp and linear only."""
    proximal: Annotated[float, Field(ge=0.0)] = 0.0
    """FedProx: adds this / 2 times the squared distance from the round's model to the loss."""
    control_variates: bool = False
    """SCAFFOLD: corrects each client's drift; with sgd without momentum, weight decay and proximal term."""

    @model_validator(mode="after")
    def _fits(self) -> LocalConfig:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum goes with optimizer sgd, got {self.optimizer}")
        plain = self.optimizer == "sgd" and not (self.momentum or self.weight_decay or self.proximal)
        if self.control_variates and not plain:
            raise ValueError(
                "control_variates reads mean gradients off the update: wanted optimizer sgd, and momentum, "
                "weight_decay and proximal 0"
            )
        return self


class LocalAttackConfig(Section):
    name: Literal["fgsm", "pgd"] = "pgd"
    """How clients make their training examples, each against its own model; pgd starts at random."""
    eps: Annotated[Budget, Field(le=1.0)] = 8 / 255
    """Linf budget, inputs in [0, 1]; may be written 8/255. Also that of robust accuracy, against PGD-20."""
    steps: Count = 5
    """pgd only."""


class PersonalConfig(Section):
    test: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of each client's rows that nobody trains on, to compare the global model with the client's own."""
    epochs: Count = 5
    """Passes over the client's other rows, from the final global model."""
    rate: Positive | None = None
    """null: local.rate."""
    penalty: Annotated[float, Field(ge=0.0)] = 0.1
    """RTFA's lambda."""


class ServerConfig(Section):
    optimizer: Literal["average", "momentum", "adam"] = "average"
    """What becomes of the mean update. average: FedAvg; momentum: FedAvgM, DiLoCo with nesterov; adam: FedAdam."""
    rate: Positive = 1.0
    """Learning rate; adam wants a small one, such as 0.01."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of momentum; adam's beta1."""
    nesterov: bool = False
    """momentum only."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """adam only."""
    tau: Positive = 1e-3
    """adam only: added to the square root."""
    weights: Literal["samples", "uniform"] = "samples"
    """Of the clients in the mean: their numbers of rows, or all the same."""


class CodingConfig(Section):
    density: Density = 0.01
    """Fraction of coordinates sent."""
    values: Literal["fp32", "fp16", "bf16", "int8", "4bit", "2bit", "sign"] = "4bit"
    """On the wire. sign: sign x mean magnitude of the selected, as sparse ternary compression has it."""
    indices: Literal["elias_fano", "rice"] = "elias_fano"
    """On the wire; rice is shorter and may leave out a few of the smallest coordinates."""
    selector: Literal["sampled", "exact"] = "sampled"
    """Both select the same coordinates."""
    fuse_below: Annotated[int, Field(ge=0)] = 2048
    """Tensors with fewer elements are selected together, with one scale."""


class UploadConfig(CodingConfig):
    residual: bool = True
    """Clients keep what they did not send until they take part again; false: it is lost."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Momentum correction inside a client's residual. 0, because a velocity that rests while its client is offline is
    stale when it comes back: 0.9 cost 4.7 points of accuracy at 10 % participation."""
    masking: bool = True
    """Momentum factor masking."""

    @model_validator(mode="after")
    def _momentum_needs_the_residual(self) -> UploadConfig:
        if self.momentum and not self.residual:
            raise ValueError("momentum needs residual true")
        return self


class LinksConfig(Section):
    download_mbit: Positive = 20.0
    """Median of the clients' bandwidths, 10^6 bit a second."""
    upload_mbit: Positive = 5.0
    """Median of the clients' bandwidths, 10^6 bit a second."""
    bandwidth_spread: Annotated[float, Field(ge=0.0, le=10.0)] = 0.75
    """Standard deviation of the natural logarithm, per client and direction; 0: all have the median."""
    latency_s: Annotated[float, Field(ge=0.0)] = 0.05
    """Median, before each transfer."""
    latency_spread: Annotated[float, Field(ge=0.0, le=10.0)] = 0.5
    """As bandwidth_spread."""
    examples_per_s: Positive = 1000.0
    """Median of the rows a client trains on in a second."""
    compute_spread: Annotated[float, Field(ge=0.0, le=10.0)] = 0.5
    """As bandwidth_spread."""
    traces: Path | None = None
    """CSV with columns trace,start_s,stop_s,download_mbit,upload_mbit: bandwidth over time instead of a constant one.
    Client i follows the i-th trace, counted round, and starts again at its end."""
    drop_out: Share = 0.0
    """Probability that a client is lost in the middle of its upload."""


class AvailabilityConfig(Section):
    name: Literal["always", "bernoulli", "markov", "diurnal", "labels"] = "always"
    """Which clients can be reached in a round. bernoulli: each with probability `share`; markov: stays as it is with
    probability `stay`, in the long run there for `share`; diurnal: a daily wave around `share`, each client with its
    own phase; labels: more often, the higher the client's class numbers are."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Of rounds in which a client is there."""
    stay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """markov only: correlation of one round with the next."""
    strength: Share = 1.0
    """diurnal and labels only: how far probabilities go from `share`; 1: down to 0, and as far up."""
    day_s: Positive = 86400.0
    """diurnal only: length of a day on the virtual clock."""


class RoundsConfig(Section):
    number: Count = 50
    """Updates of the global model."""
    buffer: Count | None = None
    """Asynchronous (FedBuff): per_round clients are always at work, and the model is updated whenever so many of them
    have arrived, late ones counting for less; null: in rounds."""
    over_selection: Annotated[float, Field(ge=0.0)] = 0.0
    """More clients to start than per_round, as a share of it; the round ends with the first per_round to arrive."""
    retry_s: Positive = 60.0
    """Seconds until the next round when nobody can be reached."""
    deadline_s: Positive | None = None
    """Seconds after which the round goes on without those who have not arrived; null: waits for all."""


class SimulatedEvaluationConfig(Section):
    every: Count = 10
    """Rounds between looks at the held-out rows, and checkpoints; the test file is read at the end."""
    batch_size: Count = 500
    """Rows at once."""


class ExecuteConfig(Section):
    executor: Literal["batched", "serial"] = "batched"
    """How clients are trained. batched: `cohort` at once, as stacked tensors, where the model is mlp or linear;
    serial: one after the other."""
    cohort: Count = 50
    """Clients trained, coded and checked together. Their models and gradients should fit into the processor's cache."""
    threads: Count = 1
    """Of torch, in each process."""
    actors: Count | None = None
    """Ray actors to train on, each a cohort at a time, on one machine or several; null: in this process. Any number
    gives the same bits."""
    address: str | None = None
    """actors only: address of an existing Ray cluster; null starts a private one on this machine."""
    memory_limit_bytes: Count = 512 * 1024**2
    """Of what clients keep between rounds; what is beyond lies in memory-mapped files in the run directory."""

    @model_validator(mode="after")
    def _address_needs_actors(self) -> ExecuteConfig:
        if self.address is not None and self.actors is None:
            raise ValueError(f"address {self.address} goes with a number of actors, got null")
        return self


class SimulatedMetricsConfig(Section):
    port: Annotated[int, Field(ge=0, le=65535)] | None = 9400
    """Prometheus; another free port if taken; 0: any; null: no exporter."""
    host: str = "127.0.0.1"
    """Where the exporter listens."""
    linger_s: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds the exporter stays after the end, so that the last values are scraped."""


class SimulateConfig(Section):
    data: SimulatedDataConfig
    run: RunConfig = RunConfig()
    model: Literal["mlp", "linear", "cnn_gn"] = "mlp"
    """A reference network without batch norm."""
    clients: ClientsConfig = ClientsConfig()
    local: LocalConfig = LocalConfig()
    attack: LocalAttackConfig | None = None
    """Local adversarial training; null: natural training."""
    server: ServerConfig = ServerConfig()
    upload: UploadConfig | None = None
    """Compression of what clients send; null: float32."""
    download: CodingConfig | None = None
    """Compression of what the server sends; what it leaves out stays in the server's residual. null: float32."""
    rounds: RoundsConfig = RoundsConfig()
    links: LinksConfig = LinksConfig()
    availability: AvailabilityConfig = AvailabilityConfig()
    personal: PersonalConfig | None = None
    """A personal model for every client at the end (FTFA and RTFA), next to the global one; null: none."""
    evaluate: SimulatedEvaluationConfig = SimulatedEvaluationConfig()
    execute: ExecuteConfig = ExecuteConfig()
    metrics: SimulatedMetricsConfig = SimulatedMetricsConfig()

    @model_validator(mode="after")
    def _buffer_fits(self) -> SimulateConfig:
        rounds, clients = self.rounds, self.clients
        if rounds.buffer is None:
            return self
        if rounds.deadline_s is not None or rounds.over_selection or self.local.control_variates:
            raise ValueError(
                "rounds.buffer excludes rounds.deadline_s, rounds.over_selection and local.control_variates"
            )
        if clients.registered is not None and clients.per_round + rounds.buffer > clients.registered:
            raise ValueError(
                f"rounds.buffer {rounds.buffer} and clients.per_round {clients.per_round} are more than "
                f"{clients.registered} registered clients: some wait in the buffer while others work"
            )
        return self

    @model_validator(mode="after")
    def _personal_rows_are_the_clients_own(self) -> SimulateConfig:
        if self.personal is not None and self.clients.rows is not None:
            raise ValueError("personal needs rows that no other client trains on: set clients.rows to null")
        return self

    @model_validator(mode="after")
    def _scaffold_sends_no_compressed_downloads(self) -> SimulateConfig:
        if self.local.control_variates and self.download is not None:
            raise ValueError("local.control_variates and download exclude each other; set one of them to null or false")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> SimulateConfig:
    """Reads a YAML file, applies `a.b=c` overrides; ConfigError in one line."""
    return parse(configuration.read(path, overrides), str(path))


def parse(values: dict[str, Any], source: str) -> SimulateConfig:
    """Validates a nested mapping; raises ConfigError naming `source`."""
    return configuration.parse_as(SimulateConfig, values, source)
