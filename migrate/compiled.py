"""The compiled page functions, where they were built (layer 0).

`page_functions` is the module `migrate._pages`, or None: then its users do the same in numpy, more
slowly. Tests hold the two equal.
"""

from __future__ import annotations

import importlib
from typing import Any

page_functions: Any
try:
    page_functions = importlib.import_module("migrate._pages")
except ImportError:  # not built on this host
    page_functions = None
