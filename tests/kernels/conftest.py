from __future__ import annotations

from quick_interpreter import patch_once

patch_once()
