"""The folder of an encoded corpus: a Parquet file per block of the corpus, and a manifest of what made them.

Who encodes is left to `ray_engine`. The idea: a shard is written under another name and renamed, so one that has its
name is whole, and what is missing is what is left to do. The manifest is written before the first shard, and later
calls must agree with it: vectors of other weights, prompts or dims never share a folder.

A shard has the columns `id` (text) and `embedding` (list of D float32). Its rows are in the order of the corpus, and so
are the names of the shards. Readers of Parquet folders skip the manifest, whose name begins with `_`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from ostro.errors import DataError, OstroError, RecipeError, shorten

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"


class ShardFolder:
    """The shards of one corpus, those that are there and those that are not.

    Attributes:
        path: The folder.
        settings: What the vectors depend on.
        num_rows: Rows of each shard by its file name; empty until `start`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Opens a folder that is absent, empty or was made with the same settings.

        Args:
            path: The folder; nothing is written yet.
            settings: What the vectors depend on, as JSON has it; values may be objects.

        Raises:
            RecipeError: When the folder was made with other settings (names them), or holds something else.
            DataError: When its manifest cannot be read.
        """
        self.path = path
        self.settings = settings
        self.num_rows: dict[str, int] = {}
        manifest = path / MANIFEST
        if manifest.is_file():
            try:
                content = json.loads(manifest.read_text(encoding="utf-8"))
                earlier, self.num_rows = _flat(content["settings"]), content["num_rows"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{manifest}: cannot be read ({error!r}); remove the folder") from error
            now = _flat(settings)
            changed = [
                f"{key} was {earlier.get(key, 'absent')}, now {now.get(key, 'absent')}"
                for key in {**earlier, **now}
                if earlier.get(key) != now.get(key)
            ]
            if changed:
                raise RecipeError(
                    f"--output: {path} was made with other settings ({shorten(changed)}); choose another folder"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RecipeError(f"--output: {path} is there and has no {MANIFEST}; choose an absent or empty folder")

    def start(self, num_rows: Mapping[str, int]) -> None:
        """Makes the folder and its manifest.

        Args:
            num_rows: Rows of each shard by its file name.

        Raises:
            OstroError: When it cannot be written.
        """
        self.num_rows = dict(num_rows)
        content = {"settings": self.settings, "total_rows": sum(num_rows.values()), "num_rows": self.num_rows}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _publish(self.path / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise OstroError(f"{self.path}: cannot be written ({error.strerror}); choose another --output") from error

    def unfinished(self) -> list[str]:
        """Names of the shards that are not there, or not whole, which a log line tells."""
        return [name for name, num_rows in self.num_rows.items() if not self._is_whole(name, num_rows)]

    def remove(self, pattern: str) -> None:
        """Removes files of the folder by a glob pattern."""
        for path in self.path.glob(pattern):
            path.unlink(missing_ok=True)

    def _is_whole(self, name: str, num_rows: int) -> bool:
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_metadata(self.path / name).num_rows
        except FileNotFoundError:
            return False
        except (OSError, pyarrow.ArrowException) as error:
            logger.info("%s: cannot be read (%s); encoded again", self.path / name, str(error).partition("\n")[0])
            return False
        if found != num_rows:
            logger.info("%s: has %d rows, not %d; encoded again", self.path / name, found, num_rows)
        return bool(found == num_rows)


def write_shard(path: Path, ids: Sequence[str], embeddings: npt.NDArray[np.float32]) -> None:
    """Writes a shard, which appears whole or not at all.

    Args:
        path: The file.
        ids: N ids.
        embeddings: `[N, D]` float32.

    Raises:
        OSError: When it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.reshape(-1)), embeddings.shape[1])
    table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "embedding": vectors})
    sink = pyarrow.BufferOutputStream()
    # floats of vectors do not compress, and each is another
    pyarrow.parquet.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    _publish(path, sink.getvalue())


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of all JSON and safetensors files of a weights folder.

    Args:
        folder: A weights folder; read whole.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _publish(path: Path, content: bytes) -> None:
    """Writes a file under another name, flushes it to the disk and renames it."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, those of an object by both keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key} {inner}": part for inner, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat
