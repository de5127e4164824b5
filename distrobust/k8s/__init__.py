"""A configuration file as Kubernetes manifests, for the KubeRay operator. Pure functions from values to documents.

    inside.py       the configuration as it is run inside a cluster
    pods.py         the pods of a run: head, workers, submitter
    run.py          what one run is: RayJob, its configuration, who may talk to it, what may not evict it
    namespace.py    what a namespace needs once: service account, claim, a pod to put data in and take reports out
    monitoring.py   what Prometheus' operator and Grafana are told
    overlays.py     named sets of overrides, and the kustomize patches that amount to the same
    tree.py         all generated files of the repository's k8s/ directory

A document is a dictionary as in YAML. Nobody edits YAML in two places: k8s/base is run.py's answer for
launch/digits.yaml, an overlay's patches are the difference two answers make, and a test holds the files equal to both.
"""

from typing import Any

Document = dict[str, Any]
