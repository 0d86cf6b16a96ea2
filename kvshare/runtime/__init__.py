"""The shared-cache form. What `SHIPPED` names lies inside checkpoints and imports nothing else of kvshare."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "modeling_kvshare.py",
    "kvshare_attention.py",
    "kvshare_bits.py",
    "kvshare_cpu.py",
    "kvshare_c.py",
    "kvshare_triton.py",
    "kvshare_kernels.py",
)
SHIPPED = tuple(Path(__file__).with_name(name) for name in NAMES)
