"""Fixtures for the tests of report.html."""

import pytest
from helpers.made_up_report import draw_figure


@pytest.fixture(scope="module")
def figures_folder(tmp_path_factory):
    """A folder with figures."""
    path = tmp_path_factory.mktemp("figures")
    for name in ("rewards", "routes"):
        draw_figure(path / f"{name}.svg", name)
    return path
