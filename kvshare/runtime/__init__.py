"""The shared-cache form. `modeling_kvshare.py` is the file that ships inside checkpoints; it imports nothing of kvshare."""

from __future__ import annotations

from pathlib import Path

MODELING_FILE = Path(__file__).with_name("modeling_kvshare.py")
