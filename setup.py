import re
from pathlib import Path

from setuptools import find_packages, setup

# the one place of the version is nitro_e/__init__.py, which needs no library to be read
version = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("nitro_e").joinpath("__init__.py").read_text()
)[1]

# all of them write or read opset 18; tried with 1.23, 0.7 and 1.31
EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"]
# the page of `nitro-e serve`; 5 takes theme and styles elsewhere, 6.0.0 needs a pre-release of its client
GRADIO = "gradio>=6.0.1"

setup(
    name="nitro-e",
    version=version,
    description="Train, post-train, distil and ablate E-MMDiT, a small and fast text-to-image model",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["nitro_e", "nitro_e.*"]),
    package_data={
        "nitro_e.shapes": [
            "pretrained/*/*.json",
            "pretrained/*/*.safetensors",
            "pretrained/*/adapter/*",
        ],  # the offline domain's weights
        "nitro_e.rewards.geneval": ["*.txt"],  # the test prompts
        "nitro_e.record": ["templates/*"],
        # py.typed; the weights of configs/emoji
        "nitro_e": [
            "py.typed",
            "pretrained/*/*.tsv",
            "pretrained/*/*/*.json",
            "pretrained/*/*/*.safetensors",
        ],
    },
    entry_points={"console_scripts": ["nitro-e = nitro_e.cli:main"]},
    # The lower bounds are what `make test-floors` installs and tests; raise one with the code that needs it.
    install_requires=[  # enough to sample
        "torch>=2.6",
        "einops>=0.8",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "pyyaml>=6.0.1",
        "tqdm>=4.66",
        "pillow>=10.1",
        "jinja2>=3.1",  # the pages on runs and evaluations
        "huggingface_hub>=0.34",
        "diffusers>=0.35",  # DC-AE; older ones overlook settings of the shipped codec
        "transformers>=4.57.1",  # Llama
        "ftfy>=6.1",  # the released weights' caption cleaner, like beautifulsoup4
        "beautifulsoup4>=4.12",
    ],
    extras_require={
        "train": [
            "accelerate>=1.2",
            "webdataset>=0.2.100",
            "wandb>=0.18",
            "tensorboard>=2.17",
            "timm>=1.0.29",  # DINOv2, for REPA; older ones stumble over a folder with several safetensors files
            "torchvision>=0.21",  # timm's; the one of torch 2.6
            "peft>=0.18",  # LoRA; older ones take our model's config for a dict
            "fsspec>=2025.5",  # shards behind URLs; older ones hang in forked processes
            "aiohttp>=3.9",  # fsspec's http
            "pyarrow>=14",  # packing parquet
        ],
        "eval": [
            "scipy>=1.11.2",  # transformers' Mask2Former, for GenEval
            "torch-fidelity>=0.4.0",  # the Inception network of FID
        ],
        "export": EXPORT,
        "serve": [GRADIO],
        "dev": [
            *EXPORT,
            GRADIO,
            "pytest>=8.0",
            "pytest-xdist>=3.5",  # the tests on two cores: 5 minutes instead of 10
            "ruff>=0.17",  # make lint, like the next two
            "mypy>=1.18",
            "types-PyYAML>=6.0.12",
            "nbclient>=0.10",  # runs examples/tour.ipynb, like ipykernel
            "ipykernel>=6.29",
        ],
    },
)
