"""Train the toy stage of `test_engine.py` in this process (or in each process of torchrun).

python toy_run.py RUN '{"steps": 12, "fault": "nan", "pause": 0.01}'
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from test_engine import ToyBatch, ToyStage

from nitro_e.cli import common as cli
from nitro_e.training.engine import EMAConfig, Engine, EngineConfig, make_accelerator

RANK = int(os.environ.get("RANK", 0))


class FaultyStage(ToyStage):
    """Something goes wrong on one process only; `pause` seconds per micro-batch leave time for it."""

    def __init__(self, fault: str | None, pause: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.fault, self.pause = fault, pause

    def batches(self, step, rank, world, accumulate):
        for number, batch in enumerate(super().batches(step, rank, world, accumulate)):
            if number == 5 * accumulate and rank == world - 1:
                if self.fault == "nan":
                    batch = ToyBatch(batch.x * float("nan"), batch.keys)
                elif self.fault == "sigterm":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif self.fault == "sigusr1":
                    os.kill(os.getpid(), signal.SIGUSR1)
                elif self.fault == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.fault == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(self.pause)
            yield batch


def main(run: Path, options: dict) -> None:
    faults = {key: options.pop(key) for key in ("fault", "pause") if key in options}
    batch_size, accumulate = options.pop("batch_size", 8), options.pop("accumulate", 1)
    torch.set_num_threads(1)
    options = {
        "steps": 12,
        "save_every": 4,
        "log_every": 1,
        "precision": "float32",
        "tracker": "none",
        **options,
    }
    config = EngineConfig(**options, ema=EMAConfig(beta=0.9))
    accelerator = make_accelerator(config)
    if RANK == 0:
        run.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    stage = FaultyStage(**{"fault": None, **faults}, batch_size=batch_size)
    trainer = Engine(config, stage, accelerator, run=run, seed=1, use={}, record={}, accumulate=accumulate)
    trainer.run()
    # in one write, or the lines of two processes can share one
    sys.stdout.write(f"rank {RANK} ended at step {trainer.step}, skipped {trainer.state.skipped}\n")
    sent = any(getattr(phase.net, "broadcast_buffers", False) for phase in stage.phases)
    sys.stdout.write(f"buffers are sent with every step: {sent}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.leave(cli.run(lambda: main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
