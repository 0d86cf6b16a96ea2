"""The shared-cache form. What `SHIPPED` names lies inside checkpoints and imports nothing else of kvshare."""

from __future__ import annotations

from pathlib import Path

NAMES = (
    "modeling_kvshare.py",
    "kvshare_attention.py",
    "kvshare_tables.py",
    "kvshare_positions.py",
    "kvshare_projections.py",
    "kvshare_bits.py",
    "kvshare_cache.py",
    "kvshare_channels.py",
    "kvshare_classes.py",
    "kvshare_cpu.py",
    "kvshare_c.py",
    "kvshare_triton.py",
    "kvshare_kernels.py",
    "kvshare_splits.py",
    "kvshare_tiles.py",
    "kvshare_rotated.py",
    "kvshare_mlx.py",
)
MLX = "kvshare_mlx.py"  # the file that mlx-lm is told of
ROTATED = "kvshare_rotated_"  # what the model type of a checkpoint in rotated form begins with; its family's follows
ROTATED_MODELING = "kvshare_rotated.py"  # the file that its config names
ROTATED_CLASS = "KVShareRotated"  # what the names of its classes begin with
SHIPPED = tuple(Path(__file__).with_name(name) for name in NAMES)
