"""Runs an example several times in one process: `several.py example.py "A --epochs 4" "B --epochs 2" "B --epochs 4"`.

Importing torch and a trainer takes longer than the examples themselves. The process group is made once, since a second
init_process_group in a process of torchrun waits for ever (torch 2.13, gloo).
"""

import os
import runpy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def _already(*_: object, **__: object) -> None:
    """Instead of making or ending the process group."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    dist.init_process_group = _already
    end, dist.destroy_process_group = dist.destroy_process_group, _already
    main = runpy.run_path(sys.argv[1], run_name="example")["main"]
    for command_line in sys.argv[2:]:
        main(command_line.split())
    end()
    sys.stdout.flush()
    os._exit(0)  # now and then torch 2.13 aborts in the interpreter's own exit, when gloo's threads outlive their group
