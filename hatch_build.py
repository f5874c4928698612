"""Brings the web page's viewer library into the package while it is built; a build never fails for want of it."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ViewerHook(BuildHookInterface):  # type: ignore[type-arg]
    """Fetches the pinned viewer library before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Puts the library below src/ctseg/server/web/vendor/, or warns."""
        source = Path(self.root) / "src"
        sys.path.insert(0, str(source))
        try:
            from ctseg.server import viewer

            viewer.bring_viewer(source / "ctseg" / "server" / "web")
        except Exception as problem:
            self.app.display_warning(
                f"ctseg: the web page of `ctseg serve` will lack its viewer ({problem}). "
                "Bring it in later, with access to the npm registry: python -m ctseg.server.viewer"
            )
        finally:
            sys.path.remove(str(source))
