"""The figures of the documentation are what their command draws."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent


def load_tool():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tools/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_what_the_command_draws():
    tool = load_tool()
    found = tool.figures(tool.read_numbers())
    assert len(found) == 4
    for name, text in found.items():
        ElementTree.fromstring(text)
        assert (tool.IMAGES / name).read_text() == text, f"{name} is old: run tools/figures.py"


def test_the_tokens_of_the_architecture_come_from_the_config():
    text = load_tool().figures(load_tool().read_numbers())["architecture.svg"]
    assert "80 tokens" in text and "256 tokens" in text and "302M parameters" in text
