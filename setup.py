from setuptools import find_packages, setup

setup(
    name="nitro-e",
    version="0.1.0",
    description="Train, post-train, distil and ablate E-MMDiT, a small and fast text-to-image model",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["nitro_e", "nitro_e.*"]),
    package_data={
        "nitro_e.shapes.pretrained": ["*/*.json", "*/*.safetensors"],  # the offline domain's weights
        "nitro_e.geneval": ["*.txt"],  # the test prompts
    },
    install_requires=[  # enough to sample
        "torch>=2.6",
        "einops>=0.8",
        "numpy>=1.26",
        "safetensors>=0.4",
        "pyyaml>=6.0",
        "tqdm>=4.60",
        "pillow>=10.0",
        "huggingface_hub>=0.25",
        "diffusers>=0.34",  # DC-AE
        "transformers>=4.48",  # Llama
    ],
    extras_require={
        "train": [
            "accelerate>=1.2",
            "ema-pytorch>=0.7.3",
            "webdataset>=0.2.100",
            "wandb>=0.18",
            "tensorboard>=2.17",
            "torchvision",
            "timm>=1.0.12",  # DINOv2, for REPA
            "peft>=0.14",  # LoRA
            "scipy>=1.10",  # transformers' Mask2Former, for GenEval
            "fsspec>=2024.1",  # shards behind URLs
            "aiohttp>=3.9",  # fsspec's http
            "pyarrow>=14",  # packing parquet
        ],
        "eval": [
            "ftfy>=6.1",  # the released weights' caption cleaner
            "beautifulsoup4>=4.12",
            "scipy>=1.10",  # transformers' Mask2Former, for GenEval
        ],
        "dev": [
            "pytest>=8.0",
        ],
    },
)
