"""``python -m app``: the page with the default settings; ``crowdexit app`` has the options."""

from __future__ import annotations

import sys

from app.page import launch
from crowdexit.errors import CrowdExitError

if __name__ == "__main__":
    try:
        launch()
    except CrowdExitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
