"""Runs by their configuration, in one JSON file that is never half written."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any


def key(config: dict[str, Any]) -> str:
    """Return the name of a configuration: the same for the same values."""
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """The runs of one file, read at the start and written after every addition."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[str, Any] = self._read()

    def _read(self):
        if not self.path.exists():
            return {}
        try:
            return json.loads(self.path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} is no file of results ({error}); move it away"
            ) from None

    def __contains__(self, config: dict[str, Any]) -> bool:
        return key(config) in self.runs

    def __getitem__(self, config: dict[str, Any]) -> dict[str, Any]:
        return self.runs[key(config)]

    def add(self, runs: list[dict[str, Any]]) -> None:
        """Add runs, each with its `config`, and write the file.

        What another process has added meanwhile is kept. The file is replaced in one
        step, so that a run that is stopped leaves the old one or the new one.
        """
        self.runs = self._read() | {key(run["config"]): _finite(run) for run in runs}
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.runs, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)


def _finite(value):
    """Return `value` with null for numbers that JSON has no name for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
