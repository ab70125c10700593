"""Train the frozen encoders of the offline domain, which the package ships: one command each.

    python tools/train_components.py codec       # a small AutoencoderDC, f8c8
    python tools/train_components.py text        # a small Llama that reads captions
    python tools/train_components.py vision      # a small ViT, the target of REPA

Each trains on rendered scenes of the train split, measures itself on others (metrics.json: what and how many), and
writes a folder that the library class of the real component loads. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from nitro_e import cli, progress
from nitro_e.config import ConfigError
from nitro_e.files import save_object
from nitro_e.shapes import fit
from nitro_e.shapes.pretrained import PRETRAINED

SAVE_EVERY = 30  # seconds


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("component", choices=sorted(fit.COMPONENTS))
    parser.add_argument("--out", type=Path, help="folder of the result; default: the one in the package")
    parser.add_argument("--steps", type=int, help="default: as shipped")
    parser.add_argument("--seed", type=cli.seed, default=0, metavar="N")
    args = parser.parse_args(argv)
    return cli.run(
        lambda: train(args.component, args.out or PRETRAINED / args.component, args.steps, args.seed)
    )


def train(component: str, out: Path, steps: int | None = None, seed: int = 0) -> dict:
    """Train, measure, export; returns what metrics.json says."""
    torch.manual_seed(seed)
    steps = fit.COMPONENTS[component].steps if steps is None else steps
    if steps < 1:
        raise ConfigError(f"--steps {steps}: must be at least 1")
    task = fit.COMPONENTS[component](seed)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=task.lr, betas=(0.9, 0.99), weight_decay=0.01)
    state = out.parent / f"{out.name}.training.pt"
    done, seconds, asked = 0, 0.0, {"seed": seed, "steps": steps}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["asked"] != asked:
            raise ConfigError(
                f"{state} was begun with {saved['asked']}, not {asked}; give the same, or delete it to start anew"
            )
        task.module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["step"], saved["seconds"]
    started = saved_at = time.monotonic()
    with progress.bar(total=steps, initial=done, desc=component, mininterval=1) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = task.lr * min(1, (done + 1) / 100, 2 * (1 - done / steps))
            loss = task.loss(done)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
            optimizer.step()
            done += 1
            bar.update()
            if done % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if time.monotonic() - saved_at > SAVE_EVERY or done == steps:
                saved_at = time.monotonic()
                out.parent.mkdir(parents=True, exist_ok=True)
                reached = {
                    "module": task.module.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "asked": asked,
                    "seconds": seconds + saved_at - started,
                }  # fmt: skip
                temporary = state.with_name(state.name + ".tmp")
                save_object(reached, temporary)
                os.replace(temporary, state)
    out.mkdir(parents=True, exist_ok=True)
    task.export(out)
    metrics = {
        "command": f"python tools/train_components.py {component} --seed {seed} --steps {steps}",
        "seconds": round(seconds + saved_at - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in task.shipped.parameters()),
        **task.measure(out),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    state.unlink()
    print(json.dumps(metrics, indent=1))
    return metrics


if __name__ == "__main__":
    sys.exit(main())
