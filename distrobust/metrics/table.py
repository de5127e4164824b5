"""THE table of Prometheus metrics. Dashboards, alerts and the README are checked against it.

Each row says which record field feeds it, so a metric is added here and nowhere else. Base units only:
seconds, bytes, ratios (1.0 = all). A name ends with its unit, a counter's with `_total` after the unit.
Labels have few values: never a parameter name, a bucket or a step.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One row.

    `event` and `field` name the record field that feeds it. A counter's field is cumulative and the counter
    grows by the differences; a histogram gets one observation per record (a sample: not every step has a
    record). A label other than run and rank is the record's field of that name, except `group`, which is
    the key where the field is a dictionary {group: value}. `unit` is empty for plain numbers.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    event: str
    field: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


WHO = ("run", "rank")  # on every metric: the run directory's name, and the global rank
BUILD = (*WHO, "version", "torch", "python")
PHASE = (*WHO, "phase")
GROUP = (*WHO, "phase", "group")
ATTACK = (*WHO, "phase", "attack")
EVALUATED = (*WHO, "model", "attack")

# fmt: off
# 1 ms to 1 min, closest together where steps usually are: a small network on a CPU takes 0.05 to 1 s a step,
# the hook of a worker behind a 100 Mbit/s link 0.01 to 2 s.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5, 10, 30, 60)

TABLE: tuple[Metric, ...] = (
    # What runs.
    Metric("distrobust_build_info", "gauge", "", "run", "versions", BUILD,
           "Always 1; the versions are labels."),
    Metric("distrobust_workers", "gauge", "workers", "run", "world_size", WHO,
           "Ranks that train one model."),
    Metric("distrobust_parameters", "gauge", "parameters", "run", "num_parameters", WHO,
           "Parameters of the model."),
    Metric("distrobust_worker_restarts_total", "counter", "restarts", "run", "restarts", WHO,
           "Earlier starts of this run that this start continues."),
    Metric("distrobust_planned_steps", "gauge", "steps", "phase", "num_steps", PHASE,
           "Optimizer steps this phase will take."),
    Metric("distrobust_training", "gauge", "", "activity", "training", WHO,
           "1 while steps are being taken, 0 before and after, as during the final evaluation."),
    Metric("distrobust_training_change_timestamp_seconds", "gauge", "seconds", "activity", "time", WHO,
           "Unix time at which steps last began or ended."),
    # Progress.
    Metric("distrobust_finished_steps", "gauge", "steps", "step", "step", PHASE,
           "Optimizer steps finished in this phase, those before a restart included."),
    Metric("distrobust_steps_total", "counter", "steps", "step", "step", PHASE,
           "Optimizer steps taken since this process started."),
    Metric("distrobust_samples_total", "counter", "samples", "step", "samples", PHASE,
           "Training examples seen since this process started."),
    Metric("distrobust_nonfinite_steps_total", "counter", "steps", "step", "nonfinite_steps", PHASE,
           "Steps skipped on all ranks because a gradient was not finite."),
    Metric("distrobust_last_step_timestamp_seconds", "gauge", "seconds", "step", "time", PHASE,
           "Unix time of the newest step record; its age shows a stall."),
    Metric("distrobust_diverged_replicas", "gauge", "replicas", "diverged", "replicas", PHASE,
           "Ranks whose parameters differed from rank 0; the run ends there."),
    # Time.
    Metric("distrobust_step_seconds", "histogram", "seconds", "step", "step_s", PHASE,
           "Wall time of a whole training step, sampled.", SECONDS),
    Metric("distrobust_attack_seconds", "histogram", "seconds", "step", "attack_s", PHASE,
           "Part of a step spent making adversarial examples, sampled.", SECONDS),
    Metric("distrobust_comm_hook_seconds", "histogram", "seconds", "step", "hook_s", PHASE,
           "Part of a step spent accumulating, selecting and coding gradients; without waiting and decoding.", SECONDS),
    Metric("distrobust_comm_decode_seconds", "histogram", "seconds", "step", "decode_s", PHASE,
           "Part of a step spent decoding and applying what the ranks sent, overlaps added up.", SECONDS),
    # Bytes between ranks.
    Metric("distrobust_comm_sent_bytes_total", "counter", "bytes", "step", "sent_bytes", PHASE,
           "Bytes this rank handed to the transport."),
    Metric("distrobust_comm_dense_bytes_total", "counter", "bytes", "step", "dense_bytes", PHASE,
           "Bytes a dense fp32 all-reduce would have sent from this rank."),
    Metric("distrobust_comm_density_ratio", "gauge", "ratio", "step", "density", PHASE,
           "Fraction of gradient coordinates sent; 1 when dense."),
    Metric("distrobust_comm_residual_norm_ratio", "gauge", "ratio", "step", "residual_norm_ratio", PHASE,
           "Norm of what is kept back over the norm of the gradient."),
    # Learning.
    Metric("distrobust_train_loss", "gauge", "", "step", "loss", PHASE,
           "Loss of the newest step record."),
    Metric("distrobust_train_accuracy_ratio", "gauge", "ratio", "step", "accuracy", PHASE,
           "Accuracy on the inputs trained on, attacked where training attacks."),
    Metric("distrobust_learning_rate", "gauge", "", "step", "lr", PHASE,
           "Scheduled learning rate, before the ratio of each layer group."),
    Metric("distrobust_layer_lr_ratio", "gauge", "ratio", "step", "layer_lr_ratio", GROUP,
           "Mean learning rate of a layer group over the scheduled one."),
    Metric("distrobust_layer_gradient_noise", "gauge", "", "step", "layer_noise", GROUP,
           "Root mean square norm of the difference of two independent mean gradients, over a layer group."),
    Metric("distrobust_attack_eps_ratio", "gauge", "ratio", "step", "eps", PHASE,
           "Radius of the training attack, as a fraction of the pixel range."),
    Metric("distrobust_clean_accuracy_ratio", "gauge", "ratio", "epoch", "clean_accuracy", PHASE,
           "Accuracy on unchanged held-out inputs, once per epoch."),
    Metric("distrobust_robust_accuracy_ratio", "gauge", "ratio", "epoch", "robust_accuracy", ATTACK,
           "Accuracy on attacked held-out inputs, once per epoch."),
    Metric("distrobust_attack_gap_ratio", "gauge", "ratio", "watch", "gap", PHASE,
           "Held-out accuracy under FGSM less that under PGD-10 at the present radius; high after a collapse."),
    # Checkpoints.
    Metric("distrobust_checkpoint_seconds", "histogram", "seconds", "checkpoint", "seconds", PHASE,
           "Wall time of writing a checkpoint.", SECONDS),
    Metric("distrobust_checkpoint_bytes", "gauge", "bytes", "checkpoint", "bytes", PHASE,
           "Size of the newest checkpoint."),
    Metric("distrobust_last_checkpoint_timestamp_seconds", "gauge", "seconds", "checkpoint", "time", PHASE,
           "Unix time of the newest checkpoint."),
    Metric("distrobust_checkpoint_failures_total", "counter", "failures", "checkpoint_failed", "failures", PHASE,
           "Checkpoints that could not be written; training went on."),
    # The final evaluation.
    Metric("distrobust_evaluation_accuracy_ratio", "gauge", "ratio", "evaluation", "accuracy", EVALUATED,
           "Accuracy of a finished model under an attack."),
    Metric("distrobust_evaluation_accuracy_low_ratio", "gauge", "ratio", "evaluation", "low", EVALUATED,
           "Lower end of the 95 % Wilson interval of the evaluation accuracy."),
    Metric("distrobust_evaluation_accuracy_high_ratio", "gauge", "ratio", "evaluation", "high", EVALUATED,
           "Upper end of the 95 % Wilson interval of the evaluation accuracy."),
    Metric("distrobust_evaluation_samples", "gauge", "samples", "evaluation", "samples", EVALUATED,
           "Held-out examples the evaluation used."),
    # A federated simulation. Seconds but those of a round are the virtual clock's, of all clients together.
    Metric("distrobust_federated_planned_rounds", "gauge", "rounds", "federated_round", "planned_rounds", WHO,
           "Rounds this simulation will take."),
    Metric("distrobust_federated_finished_rounds", "gauge", "rounds", "federated_round", "finished_rounds", WHO,
           "Rounds finished, those before a restart included."),
    Metric("distrobust_federated_rounds_total", "counter", "rounds", "federated_round", "rounds", WHO,
           "Rounds finished since this process started."),
    Metric("distrobust_federated_last_round_timestamp_seconds", "gauge", "seconds", "federated_round", "time", WHO,
           "Unix time of the newest round; its age shows a stall."),
    Metric("distrobust_federated_round_seconds", "histogram", "seconds", "federated_round", "host_s", WHO,
           "Wall time of simulating a round.", SECONDS),
    Metric("distrobust_federated_clock_seconds", "gauge", "seconds", "federated_round", "clock_s", WHO,
           "Where the virtual clock stands."),
    Metric("distrobust_federated_train_loss", "gauge", "", "federated_round", "loss", WHO,
           "Mean loss of the round's clients before their first local step."),
    Metric("distrobust_federated_updates_total", "counter", "updates", "federated_round", "updates", WHO,
           "Client updates that counted since this process started."),
    Metric("distrobust_federated_late_updates_total", "counter", "updates", "federated_round", "late", WHO,
           "Updates that arrived after the deadline."),
    Metric("distrobust_federated_surplus_updates_total", "counter", "updates", "federated_round", "surplus", WHO,
           "Updates that were not needed, because enough others had arrived."),
    Metric("distrobust_federated_lost_updates_total", "counter", "updates", "federated_round", "lost", WHO,
           "Updates lost in the middle of their upload."),
    Metric("distrobust_federated_nonfinite_updates_total", "counter", "updates", "federated_round", "nonfinite", WHO,
           "Updates excluded because they were not finite."),
    Metric("distrobust_federated_download_bytes_total", "counter", "bytes", "federated_round", "download_bytes", WHO,
           "Downloaded by all clients: lengths of messages, as far as they crossed the link."),
    Metric("distrobust_federated_wasted_download_bytes_total", "counter", "bytes", "federated_round",
           "wasted_download_bytes", WHO, "Downloaded by clients whose update did not count."),
    Metric("distrobust_federated_upload_bytes_total", "counter", "bytes", "federated_round", "upload_bytes", WHO,
           "Uploaded by all clients: lengths of messages, as far as they crossed the link."),
    Metric("distrobust_federated_wasted_upload_bytes_total", "counter", "bytes", "federated_round",
           "wasted_upload_bytes", WHO, "Uploaded by clients whose update did not count."),
    Metric("distrobust_federated_download_seconds_total", "counter", "seconds", "federated_round", "download_s", WHO,
           "Clients' time spent downloading."),
    Metric("distrobust_federated_compute_seconds_total", "counter", "seconds", "federated_round", "compute_s", WHO,
           "Clients' time spent training."),
    Metric("distrobust_federated_upload_seconds_total", "counter", "seconds", "federated_round", "upload_s", WHO,
           "Clients' time spent uploading."),
    Metric("distrobust_federated_wait_seconds_total", "counter", "seconds", "federated_round", "wait_s", WHO,
           "Clients' time spent waiting for the end of the round."),
    Metric("distrobust_federated_clean_accuracy_ratio", "gauge", "ratio", "federated_held_out", "clean", WHO,
           "Of the global model on held-out rows."),
    Metric("distrobust_federated_robust_accuracy_ratio", "gauge", "ratio", "federated_held_out", "robust", WHO,
           "Of the global model on held-out rows under PGD-20 of the clients' budget."),
    Metric("distrobust_federated_low_client_accuracy_ratio", "gauge", "ratio", "federated_held_out", "low_client", WHO,
           "One client in twenty has less, on held-out rows of its own mix of classes."),
)
# fmt: on
