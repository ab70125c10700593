"""Captioned images and latents in webdataset tars: writing, indexing, an exact order, reading."""

from nitro_e.data.catalog import MissingShards
from nitro_e.data.dataset import BadDataError, Records
from nitro_e.data.reader import Data, DataConfig, SourceConfig, open_data

__all__ = [
    "BadDataError",
    "Data",
    "DataConfig",
    "MissingShards",
    "Records",
    "SourceConfig",
    "open_data",
]
