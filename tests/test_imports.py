"""Imports go one way, and each library has few owners (an AST walk; nothing is imported)."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nitro_e"

# room, or a part of one with imports of its own: the rooms it may import besides itself; the longest name counts
TABLE = """
config:
randomness:
sizes: config
files: config
interfaces: config training.optim randomness
record: config files
model: config files interfaces
encoders: config files interfaces
sampling: config files interfaces randomness record encoders model sizes
sharing: __init__ config files interfaces encoders sampling
training: config files interfaces randomness record model
rewards: config files interfaces encoders
shapes: config interfaces rewards
data: config files interfaces randomness record rewards shapes sizes
data.making: config files interfaces randomness record rewards data sampling sizes
evaluation: config files interfaces randomness record model encoders sampling rewards shapes data
stages.assembly: config interfaces record model encoders sampling training data sizes
stages.adapter: config files interfaces model randomness
stages.batches: config interfaces data
stages.validation: config files interfaces randomness sampling data stages.assembly stages.batches
stages.first_weights: config interfaces randomness record model training stages.assembly
stages.repa: config interfaces
stages.flow_matching: config interfaces randomness model encoders sampling training data stages.assembly stages.batches
    stages.repa
stages.grpo: config files interfaces randomness record model encoders sampling training rewards data stages.adapter
    stages.assembly
stages.distill: config files interfaces randomness record model sampling training rewards data stages.adapter stages.assembly
    stages.batches
stages: config interfaces record model encoders sampling training data evaluation stages.assembly stages.first_weights
    stages.validation stages.flow_matching stages.grpo stages.distill sizes
studies: config files model encoders sampling evaluation record stages stages.validation stages.first_weights
serving: config record sampling
cli: __init__ config files interfaces randomness record model encoders sampling sharing training rewards shapes data data.making
    evaluation serving stages stages.first_weights stages.flow_matching stages.grpo studies sizes
__init__: model sampling
"""
ALLOWED = {
    room: set(allowed.split())
    for room, _, allowed in (
        line.partition(":") for line in TABLE.replace("\n    ", " ").strip().splitlines()
    )
}

# library -> the rooms or modules that may import it
OWNERS = {
    "accelerate": {"training"},
    "torch.distributed": {"training.parallel"},
    "wandb": {"record.metrics"},
    # text: the released caption cleaner; synthesis: other people's pipelines
    "diffusers": {"encoders", "sharing.diffusers_pipeline", "data.making.synthesis"},
    "transformers": {"encoders", "sharing.diffusers_pipeline", "rewards"},
    "onnxruntime": {"sharing.programs"},
    "timm": {"encoders.vision"},
    "peft": {"stages.adapter"},
    "tqdm": {"record.progress", "cli.make_shapes"},
    "jinja2": {"record.templating"},
    "webdataset": {"data.stream", "cli.benchmark"},
    "huggingface_hub": {"files"},
    "gradio": {"serving.page"},
    "torch_fidelity": {"evaluation.distances"},
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append("torch.distributed")  # it comes with torch, without an import of its own
    return found


def within(name: str, rooms: Iterable[str]) -> str | None:
    """The longest of `rooms` that `name` is or is in."""
    found = [room for room in rooms if f"{name}.".startswith(f"{room}.")]
    return max(found, key=len, default=None)


def modules() -> Iterator[tuple[str, list[str]]]:
    """Every module of the package and what it imports, as dotted names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), imports(path)


def test_import_direction():
    wrong = []
    for module, imported in modules():
        room = within(module, ALLOWED)
        assert room is not None, f"{module} is in no room of the table"
        for name in imported:
            if not name.startswith("nitro_e."):
                continue
            target = name.removeprefix("nitro_e.")
            home = within(target, ALLOWED) or "__init__"
            permitted = within(target, {room, *ALLOWED[room]}) or within(home, ALLOWED[room])
            if permitted is None or len(permitted) < len(home):  # allowed to import data is not data.making
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_every_library_has_its_owners():
    wrong = [
        f"{module} imports {name}"
        for module, imported in modules()
        for name in imported
        if (library := within(name, OWNERS)) and within(module, OWNERS[library]) is None
    ]
    assert not wrong


def test_config_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, nitro_e.config, nitro_e.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
