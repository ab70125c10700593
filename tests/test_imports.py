"""Imports go one way, and each library has few owners (an AST walk; nothing is imported)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nitro_e"

# module or folder -> the parts of the package it may import
ALLOWED = {
    "config": set(),
    "randomness": set(),
    "interfaces": {"config", "optim", "randomness"},  # the last two for annotations only
    "cli": {"config", "progress"},
    "progress": set(),
    "flow": {"config"},
    "parallel": {"config"},
    "ema": {"config", "files"},
    "report": {"checkpoint", "config", "metrics", "charts"},
    "optim": {"config"},
    "environment": set(),
    "metrics": {"config", "environment", "files"},
    "charts": set(),
    "model": {"config", "files", "interfaces"},
    "codec": {"config", "interfaces"},
    "text": {"config", "interfaces"},
    "vision": {"config", "interfaces"},
    "components": {"config", "interfaces", "files", "codec", "text", "vision", "shapes.pretrained"},
    "data": {"config", "interfaces", "files", "components", "progress", "randomness"},
    "sampling": {"config", "interfaces", "flow", "progress", "randomness"},
    "checkpoint": {"config", "files", "model", "shapes.pretrained"},
    "pipeline": {"config", "interfaces", "components", "model", "checkpoint", "sampling", "flow"},
    "stages": {
        "config",
        "files",
        "interfaces",
        "flow",
        "sampling",
        "model",
        "data",
        "optim",
        "randomness",
        "prompts",
        "rewards",
    },
    "engine": {"config", "interfaces", "checkpoint", "model.pretrained", "metrics", "report"}
    | {"files", "meters", "optim", "randomness", "parallel", "ema"},
    "meters": {"progress"},
    "files": {"config"},
    "clip": {"config"},
    "geneval": {"config", "interfaces", "files", "clip"},
    "shapes": {"config", "interfaces", "geneval", "codec", "text", "vision"},
    "prompts": {"config", "geneval", "shapes"},
    "rewards": {"config", "interfaces", "files", "clip", "geneval", "shapes"},
    "evaluation": {
        "config",
        "checkpoint",
        "environment",
        "files",
        "geneval",
        "interfaces",
        "model",
        "pipeline",
        "progress",
        "prompts",
        "randomness",
    }
    | {"report", "rewards", "sampling", "shapes"},
    "synthesis": {
        "config",
        "data",
        "interfaces",
        "pipeline",
        "progress",
        "prompts",
        "randomness",
        "sampling",
    },
    "run": None,  # everything
    "__init__": None,
}

# library -> the modules that may import it
OWNERS = {
    "accelerate": {"engine", "parallel"},
    "ema_pytorch": {"engine"},
    "wandb": {"metrics"},
    # text: the released caption cleaner; shapes: trains tiny instances; synthesis: other people's pipelines
    "diffusers": {"codec", "text", "shapes", "synthesis"},
    "transformers": {"text", "shapes", "clip", "geneval", "rewards"},
    "timm": {"vision", "shapes"},
    "peft": {"stages"},
    "tqdm": {"progress"},
    "webdataset": {"data"},
    "huggingface_hub": {"files"},
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_import_direction():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own, allowed = part(path), ALLOWED[part(path)]
        for name in imports(path):
            if not name.startswith("nitro_e.") or allowed is None:
                continue
            target = name.removeprefix("nitro_e.")
            other = target.split(".")[0]
            if (
                other != own
                and other not in allowed
                and not any(target.startswith(item + ".") for item in allowed)
            ):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_every_library_has_its_owners():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in imports(path):
            library = name.split(".")[0]
            if library in OWNERS and part(path) not in OWNERS[library]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {library}")
    assert not wrong


def test_config_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, nitro_e.config, nitro_e.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
