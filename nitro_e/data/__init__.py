"""Captioned images and latents in webdataset tars: indexing, an exact order, reading."""

from nitro_e.data.catalog import MissingShards
from nitro_e.data.data_config import DataConfig, SourceConfig
from nitro_e.data.dataset import Records
from nitro_e.data.opening import open_data
from nitro_e.data.problems import BadDataError
from nitro_e.data.reader import Data

__all__ = ["BadDataError", "Data", "DataConfig", "MissingShards", "Records", "SourceConfig", "open_data"]
