"""The whole configuration: frozen, documented, valid by construction; one section per room.

A YAML file gives the values, `--set a.b=c` overrides them, in that order. Unknown keys name the closest valid one,
impossible values say their path, what they were and what was wanted. Nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from distrobust.config.cluster import ClusterConfig
from distrobust.config.faults import FaultConfig
from distrobust.config.section import (
    AsFraction,
    Budget,
    Count,
    Density,
    Multiplier,
    Positive,
    Quantity,
    Seconds,
    Section,
    Share,
)
from distrobust.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)


class RunConfig(Section):
    dir: Path = Path("runs/default")
    """Directory of the run: resolved configuration, metrics, checkpoints, models, report. Starting again resumes it."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Everything random follows from it: initial weights, held-out split, data order, augmentation, attacks."""


class DataConfig(Section):
    path: Path
    """Directory with train.parquet and test.parquet in the Hugging Face layout (sharded names work too): images, or
    texts where there are none."""
    image_column: str | None = None
    """null: `image`, `img`, or the only column of encoded images."""
    text_column: str | None = None
    """null: `text` or `sentence`, where there is no image column."""
    length: Count = 256
    """Of texts, in bytes of UTF-8: longer ones are cut."""
    label_column: str | None = None
    """null: `label`, or its usual relatives. Integers, or strings that name the classes."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the training rows never trained on, for accuracy during the run. The test file is for the end only."""
    cache: Literal["auto", "memory", "stream"] = "auto"
    """Decode once and keep, or row group by row group in every epoch; auto: keep what fits into memory_limit_bytes."""
    memory_limit_bytes: Count = 2 * 1024**3
    """Of decoded images, per rank and data set (training, held-out, test)."""
    crop: Annotated[int, Field(ge=0)] = 0
    """Augmentation: random crop after padding by this many pixels; 0: none."""
    flip: bool = False
    """Augmentation: horizontal flip of every other image."""


class TransformerConfig(Section):
    width: Count = 64
    """Entries of a byte's embedding, and of the network's state for it; a multiple of `heads`."""
    layers: Count = 2
    """Each of attention and a network of twice the width."""
    heads: Count = 4
    """Of attention."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class ModelConfig(Section):
    name: str = "resnet9"
    """A reference network (cnn, resnet9; transformer, which reads texts), `huggingface` (the image classifier in
    `directory`), or `timm:NAME`."""
    transformer: TransformerConfig = TransformerConfig()
    """Its sizes."""
    directory: Path | None = None
    """With config.json and model.safetensors, as save_pretrained writes them: where huggingface's and timm's weights
    come from. Nothing is downloaded."""
    image_size: Count | None = None
    """Pixels a side to which huggingface's and timm's models resize images inside; null: what they were made for where
    they take no other, else images stay as they are."""
    weights: Path | None = None
    """Start from this file (models/*.pt of another run) instead of random weights."""
    channels_last: bool = False
    """Memory format; with bf16 about twice as fast on CPUs."""
    rates: dict[str, Multiplier] = Field(default_factory=dict)
    """During `train`: pattern over parameter names -> what their rate is multiplied with; 0 freezes them, batch-norm
    statistics included, and sends nothing. Of several patterns the last counts."""

    @model_validator(mode="after")
    def _directory_fits_the_name(self) -> ModelConfig:
        if self.name == "huggingface" and self.directory is None and self.weights is None:
            raise ValueError("name huggingface needs a directory with config.json and model.safetensors")
        if not self.is_from_library and (self.directory is not None or self.image_size is not None):
            which = "directory" if self.directory is not None else "image_size"
            raise ValueError(f"{which} goes with name huggingface or timm:NAME, got name {self.name}")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether its inputs are texts; attacks then move their embedding."""
        return self.name == "transformer"

    @property
    def is_from_library(self) -> bool:
        """Whether another library builds it."""
        return self.name == "huggingface" or self.name.startswith("timm:")


class ScheduleConfig(Section):
    name: Literal["one_cycle", "slow_start_fast_decay", "cosine", "constant"] = "one_cycle"
    """Shape over the phase; slow_start_fast_decay is the adversarial fine-tuning paper's."""
    peak: Positive = 0.1
    """Highest learning rate."""
    warmup: Share = 0.2
    """Share of the phase until the peak."""
    floor: Share = 0.01
    """First rate, as a share of the peak."""
    tuned_for: Count | None = None
    """Global batch size the peak was found at; at another one it is scaled, and the factor logged. null: as it is."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """With tuned_for: linear for SGD, sqrt for adaptive optimizers."""


class AccuracyGradientConfig(Section):
    window: Count = 5
    """Epochs over which held-out accuracy is averaged; no cut before more than these have passed."""
    patience: Count = 5
    """Epochs between two cuts, at least."""
    threshold: Annotated[float, Field(gt=-1.0, lt=1.0)] = 0.005
    """Cut when the average rises by less than this from one epoch to the next; a share, 0.005 is half a point."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """What the rate is multiplied with."""
    floor: Positive = 1e-6
    """Lowest rate."""


class PhaseConfig(Section):
    epochs: Count = 3
    """Passes over the training rows; rows that fill no batch differ from epoch to epoch."""
    batch_size: Count = 256
    """Over all workers."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the phase."""
    accuracy_gradient: AccuracyGradientConfig | None = None
    """Cut the rate when held-out accuracy (robust, if there is an attack) stops rising; null: never."""
    gradient_noise: Positive | None = None
    """Annealed Gaussian noise on the mean gradient: variance this / (1 + step)^0.55 a coordinate; null: none."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD; under compression it is momentum correction, in the residual."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    """Coupled (L2), added to the local gradient before it is accumulated."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the cross-entropy."""
    accumulate: Count = 1
    """Micro-batches in which a rank takes its share of a step, one exchange for all; less memory, the same examples."""
    average: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the weights, which the phase then evaluates and leaves; null: none."""
    patience: Count | None = None
    """Stop after so many epochs without a better held-out accuracy (robust, if there is an attack); null: never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the forward passes, weights and residuals stay fp32."""
    max_skipped_steps: Count = 10
    """Give up after this many non-finite steps in a row."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> PhaseConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AttackConfig(Section):
    name: Literal["fgsm", "n_fgsm", "pgd", "free"] = "n_fgsm"
    """How training examples are made during the `train` phase; free: by the steps' own backward passes."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Of the ball around an image, or around the embedding of a text: then linf, or l2 of all of it together."""
    eps: Budget = 8 / 255
    """Budget, inputs in [0, 1]; may be written 8/255. Of text: the entries of its embedding have variance 1."""
    steps: Count = 10
    """pgd only."""
    first_steps: Count | None = None
    """pgd only: steps at the start of the phase, rising linearly to `steps`; null: `steps` from the start."""
    replays: Count = 8
    """free only: how many steps in a row each batch is trained on; an epoch has as many times more steps."""
    step_size: Annotated[Positive, AsFraction] | None = None
    """null: 2.5 eps / steps for pgd, eps for fgsm and n_fgsm, the paper's for TRADES."""
    ramp: Share = 0.0
    """eps rises linearly from 0 over this share of the phase."""
    loss: Literal["pgd_at", "trades", "mart"] = "pgd_at"
    """pgd_at: cross-entropy on adversarial examples; trades: clean cross-entropy plus beta times a robust term;
    mart: adversarial cross-entropy, its margin, and beta times a robust term where the clean example is in doubt."""
    beta: Positive | None = None
    """trades and mart only: weight of the robust term; null: the papers', 6 and 5."""
    awp: Positive | None = None
    """Adversarial weight perturbation by this share of each layer's norm (the paper's: 0.01, trades 0.005)."""
    watch_every: Count | None = None
    """Steps between looks for catastrophic overfitting (FGSM against PGD-10 on held-out images), besides the end of
    each epoch; null: only there."""
    on_collapse: Literal["report", "stop", "pgd"] = "report"
    """What follows when it is seen; pgd: train on against PGD with `steps` steps."""

    @model_validator(mode="after")
    def _fits(self) -> AttackConfig:
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps {self.eps:g} is above 1 for inputs in [0, 1]; did you mean {self.eps:g}/255?")
        if self.first_steps is not None and (self.name != "pgd" or self.first_steps > self.steps):
            raise ValueError(f"first_steps goes with name pgd and is at most steps ({self.steps})")
        if self.name == "free" and (self.loss != "pgd_at" or self.step_size is not None):
            raise ValueError("free takes its examples from the training step itself: loss pgd_at, step_size null")
        if self.beta is not None and self.loss == "pgd_at":
            raise ValueError("beta goes with loss trades or mart")
        return self


class CompressConfig(Section):
    density: Density | Literal["auto"] = 0.01
    """Fraction of coordinates sent per step; 1: dense all-reduce with the momentum in the hook; auto: by a budget."""
    fewer_bytes: Positive | None = None
    """With density auto: how many times fewer bytes than dense over the whole phase, warm-up included."""
    exchange_s: Positive | None = None
    """With density auto instead: seconds a step may spend sending, on the link as measured at the start."""
    warmup: Share | None = None
    """Share of the phase spent on the paper's ladder of densities; null: 0.2, or none with step_ahead."""
    ladder: tuple[Density, ...] = (0.25, 0.0625, 0.015625, 0.004, 0.001)
    """The ladder itself; rungs at or below `density` are left out."""
    final_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the end that are sent at final_density, because what is in the residual when a run ends is lost."""
    final_density: Density = 1.0
    """Of the last steps."""
    step_ahead: bool = False
    """Compute each worker's gradient where its own unsent update will lead (step-ahead error feedback)."""
    values: Literal["fp32", "fp16", "bf16", "int8", "4bit", "2bit", "sign"] = "4bit"
    """On the wire; the rounding error stays in the residual."""
    indices: Literal["elias_fano", "rice"] = "elias_fano"
    """On the wire; rice is 0.5 bit shorter and may leave out a few of the smallest coordinates."""
    exchange: Literal["auto", "all_gather", "sharded", "hierarchical"] = "auto"
    """all_gather: every worker's message to all; sharded: through owners of parts, about 2 messages a worker;
    hierarchical: dense inside a machine, one of these between machines; auto: whichever sends least."""
    selector: Literal["sampled", "exact"] = "sampled"
    """Both select the same coordinates."""
    masking: bool | None = None
    """Momentum factor masking; null: on, or off with step_ahead."""
    clip: Positive | None = None
    """Threshold of the global gradient norm, applied per tensor to clip / sqrt(workers)."""
    fuse_below: Annotated[int, Field(ge=0)] = 2048
    """Tensors with fewer elements (biases, norms) are selected together."""

    @model_validator(mode="after")
    def _budget(self) -> CompressConfig:
        budgets = sum(value is not None for value in (self.fewer_bytes, self.exchange_s))
        if budgets != (self.density == "auto"):
            raise ValueError(
                "density auto goes with one of fewer_bytes and exchange_s, and a number with neither; "
                f"got density {self.density}, fewer_bytes {self.fewer_bytes}, exchange_s {self.exchange_s}"
            )
        return self


class NoiseConfig(Section):
    alpha: Positive = 0.1
    """Noise (Frobenius norm of a gradient difference) at which a layer's rate begins to fall."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Average of the noise over time."""


class EvaluateConfig(Section):
    images: Annotated[int, Field(ge=0)] = 0
    """Test images attacked at the end, evenly spaced over the file; 0: all. Clean accuracy always uses all."""
    held_out_images: Annotated[int, Field(ge=0)] = 500
    """Held-out images attacked after each epoch; 0: all."""
    steps: Count = 20
    """PGD steps at the end; 10 after an epoch. The norm is that of the `attack` section."""
    batch_size: Count = 250
    """Per rank."""
    eps: Annotated[Budget, Field()] | None = None
    """null: attack.eps."""
    test: bool = True
    """false: leave the test file for later; only held-out rows are evaluated, after each epoch."""


class MetricsConfig(Section):
    every: Count = 20
    """Steps between records; ranks compare their parameters and look for a stop request then."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = 9400
    """Prometheus, plus the local rank; another free port if taken; 0: any; null: no exporter."""
    host: str = "127.0.0.1"
    """Where the exporter listens."""
    linger_s: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds the exporter stays after the end, so that the last values are scraped."""
    tensorboard: bool = False
    """Curves for TensorBoard in RUN/tensorboard; needs distrobust[tensorboard]."""
    wandb: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] | None = None
    """A project of Weights & Biases, kept in RUN/wandb: nothing is sent; needs distrobust[wandb]. null: none."""


class CheckpointConfig(Section):
    every: Count | None = None
    """Steps, besides the end of each epoch; null: only there."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; never fewer than two, so that one survives a crash during the next."""
    retries: Annotated[int, Field(ge=0, le=16)] = 3
    """Further attempts at a file that could not be written; if they fail too, training goes on without it."""
    backoff_s: Seconds = 1.0
    """Before the first further attempt; twice as long before each one after it."""

    @property
    def longest_wait_s(self) -> float:
        """What all retries of a file may wait."""
        return self.backoff_s * ((1 << self.retries) - 1)


class KubernetesConfig(Section):
    image: str | None = None
    """The program's image, as the nodes know it; null: distrobust:VERSION-cpu, or -cuda with cluster.gpu."""
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")] | None = None
    """Of the RayJob: up to 47 lower-case letters, digits and dashes, a letter first; null: the name of run.dir."""
    claim: str = "distrobust"
    """Volume claim mounted at /shared in every pod, for data and runs; relative paths of this file are on it."""
    claim_size: Quantity = "50Gi"
    """Of the claim, where it is made here."""
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """Of the claim; ReadWriteOnce on clusters of one node only."""
    storage_class: str | None = None
    """Of the claim; null: the cluster's default."""
    memory: Quantity = "8Gi"
    """Of each worker; its pod gets it whole and no more."""
    head_memory: Quantity = "8Gi"
    """Of the head, where Ray's controllers and the driver live."""
    bandwidth: Quantity | None = None
    """Limit of each worker's network each way, in bits a second, such as 100M; needs the CNI's bandwidth plugin."""
    queue: str | None = None
    """Kueue's local queue; null: not queued."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often the operator starts over with a new cluster; each start continues from the last checkpoint."""
    deadline_s: Count = 86_400
    """The run is ended after so long, with all retries."""


class Config(Section):
    data: DataConfig
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PhaseConfig | None = None
    """Natural training, dense, before the adversarial fine-tuning; null: start from model.weights or from scratch."""
    train: PhaseConfig = PhaseConfig()
    """Adversarial fine-tuning."""
    attack: AttackConfig | None = AttackConfig()
    """null: the `train` phase is natural training too."""
    compress: CompressConfig | None = CompressConfig()
    """null: dense."""
    noise: NoiseConfig | None = None
    """Learning rates per layer that follow the layer's gradient noise, during `train`; null: one rate for all."""
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    faults: tuple[FaultConfig, ...] = ()
    """Injected into the run, for tests of it; refused without DISTROBUST_FAULTS=allow in the environment."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """For `distrobust k8s render`; without effect on a run."""

    @model_validator(mode="after")
    def _one_start(self) -> Config:
        if self.pretrain is not None and self.model.weights is not None:
            raise ValueError("pretrain and model.weights exclude each other; set one of them to null")
        if self.model.reads_text:
            self._check_text()
        eps = self.evaluate.eps
        if self.attack is not None and self.attack.norm == "linf" and eps is not None and eps > 1:
            raise ValueError(f"evaluate.eps {eps:g} is above 1 for inputs in [0, 1]; did you mean {eps:g}/255?")
        return self

    def _check_text(self) -> None:
        of_images = {
            "data.image_column": self.data.image_column is not None,
            "data.crop": self.data.crop > 0,
            "data.flip": self.data.flip,
            "model.channels_last": self.model.channels_last,
            "attack.norm l1": self.attack is not None and self.attack.norm == "l1",
        }
        given = [name for name, is_given in of_images.items() if is_given]
        if given:
            raise ValueError(f"model.name {self.model.name} reads texts, and {given[0]} is for images; leave it out")

    @model_validator(mode="after")
    def _retries_end_in_time(self) -> Config:
        wait, timeout = self.checkpoint.longest_wait_s, self.cluster.timeout_s
        if wait >= timeout:
            raise ValueError(
                f"checkpoint.retries and backoff_s add up to {wait:g} s, while other ranks wait no longer than "
                f"cluster.timeout_s ({timeout:g} s); lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _batches_can_be_shared(self) -> Config:
        """Found before the first node is lost, not after it."""
        for name, phase in (("pretrain", self.pretrain), ("train", self.train)):
            uneven = [size for size in self.cluster.sizes if phase is not None and phase.batch_size % size]
            if uneven and phase is not None and self.cluster.min_workers is not None:
                raise ValueError(
                    f"{name}.batch_size {phase.batch_size} cannot be shared by {uneven[0]} workers; wanted a multiple "
                    f"of every number from cluster.min_workers {self.cluster.sizes[0]} to {self.cluster.sizes[-1]}"
                )
        return self

    def identity(self) -> dict[str, Any]:
        """What a run directory is bound to: everything that changes what a run does, but not how many workers do it."""
        values = self.model_dump(mode="json")
        kept = {key: values[key] for key in ("data", "model", "pretrain", "train", "attack", "compress", "noise")}
        for harmless in ("cache", "memory_limit_bytes"):  # neither changes the order of the rows
            kept["data"].pop(harmless)
        kept["model"]["rates"] = list(kept["model"]["rates"].items())  # whose order counts
        return {"seed": self.run.seed, **kept}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides; raises ConfigError with one line that says what to change."""
    return parse(read(path, overrides), str(path))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load` validates: the file's sections as plain values, overrides applied."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file, see launch/"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: wanted sections like `data:` at the top, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return values


def parse(values: Mapping[str, Any], source: str) -> Config:
    """Validates a nested mapping; raises ConfigError naming `source`."""
    return parse_as(Config, values, source)


def parse_as(kind: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """`parse` for a configuration of another kind, such as a simulation's."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values, kind)}") from None


def dump(config: Section) -> str:
    """The resolved configuration as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def absolute(config: Config) -> Config:
    """Paths made absolute, for workers that run in another directory."""
    changed: dict[str, Section] = {
        "run": config.run.model_copy(update={"dir": config.run.dir.absolute()}),
        "data": config.data.model_copy(update={"path": config.data.path.absolute()}),
    }
    given = {"weights": config.model.weights, "directory": config.model.directory}
    changed["model"] = config.model.model_copy(update={key: path.absolute() for key, path in given.items() if path})
    return config.model_copy(update=changed)


def first_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """'train.epochs: 3 here, 6 there' for the first place where two nested values differ, None if they agree."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            where = f"{path}.{key}" if path else str(key)
            found = first_difference(ours.get(key), theirs.get(key), where)
            if found:
                return found
        return None
    return None if ours == theirs else f"{path}: {ours} here, {theirs} there"


def _override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: wanted section.key=value, for example compress.density=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML; quote it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {key!r} holds a value, not a section")
        values = inner
    values[keys[-1]] = value


def _explain(error: ValidationError, values: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """The first problem in one line; a key nobody knows comes first, since it explains a missing one."""
    # of a number or "auto" pydantic reports both alternatives, by names of its own: only the number's is of use
    wanted = [problem for problem in error.errors() if not str(problem["loc"][-1:]).startswith('("literal[')]
    problems = sorted(wanted, key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    keys = [part for part in problem["loc"] if part != "constrained-float"]
    place = [str(part) for part in keys]
    path = ".".join(place)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(place[:-1], kind)
        close = difflib.get_close_matches(place[-1], valid, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
        return f"unknown key {path!r}; {hint}{more}"
    if problem["type"] == "missing":
        return f"{path} is missing; give it in the file or with --set {path}=...{more}"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "wanted", 1)
    got: Any = values
    for part in keys:
        got = got.get(part) if isinstance(got, Mapping) else got
    return f"{path or 'configuration'}: {text}{'' if isinstance(got, Mapping) else f', got {got!r}'}{more}"


def _valid_keys(place: list[str], model: type[BaseModel]) -> list[str]:
    for name in place:
        annotation = model.model_fields[name].annotation
        options = [annotation, *get_args(annotation)]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(model.model_fields)
