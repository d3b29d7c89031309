"""Set-up runs before anything is installed, so it lies outside the package and is imported from its own folder."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "tools"))
