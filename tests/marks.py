"""Marks of tests that need what is not installed everywhere."""

import pytest

from ctseg.engine.compiled import is_installed

needs_openvino = pytest.mark.skipif(not is_installed("openvino"), reason="needs pip install 'ctseg[openvino]'")
