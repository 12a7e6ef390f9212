"""Fixtures for files of rows."""

import json

import pytest
from helpers.rows import byte_encoding


@pytest.fixture(scope="session")
def encoding():
    return byte_encoding()


@pytest.fixture
def rows(tmp_path):
    """Writes objects as JSON and bytes as they are, one per line, and returns the path."""

    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(
            b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
        )
        return path

    return write
