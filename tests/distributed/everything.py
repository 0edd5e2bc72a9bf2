"""The checks of several scripts in one start: starting costs more than most of them."""

from __future__ import annotations

import ddp
import fsdp2
import trainer_fsdp2
from harness import SCRIPTS, collect, main

MODULES = {"ddp.py": ddp, "fsdp2.py": fsdp2, "trainer_fsdp2.py": trainer_fsdp2}

if __name__ == "__main__":
    assert tuple(MODULES) == SCRIPTS
    trainer_fsdp2.as_on_a_gpu()
    main({f"{script}::{name}": check for script in SCRIPTS for name, check in collect(vars(MODULES[script])).items()})
