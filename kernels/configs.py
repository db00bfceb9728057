"""placeholder"""

from typing import NamedTuple


class Config(NamedTuple):
    schedule: str
    protocol: str
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
