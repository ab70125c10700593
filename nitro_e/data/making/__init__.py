"""Making data: packing, encoding, verifying, drawing pairs with a teacher."""

from nitro_e.data.making.writer import write_shard, write_shards

__all__ = ["write_shard", "write_shards"]
