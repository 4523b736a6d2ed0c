"""``tfds:`` sources: TensorFlow Datasets, downloaded once and read without TensorFlow."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from slm_jax.data.rows import OnRead, Pieces, Row, Source, did_you_mean, ignore_bytes
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable

CONNECT_SECONDS = 1.5  # offline, TensorFlow Datasets itself would try for minutes
DOWNLOAD_URL = "https://storage.googleapis.com"  # checked for data sets that do not state their own URL
TEXT_FEATURES = ("text", "sentence", "description")  # usual names; the first that exists is the default
# Packages of TensorFlow Datasets whose builders are unknown by name until they are imported.
_OLD_BUILDERS = ("text", "summarization", "question_answering", "translate", "text_simplification")


class TensorFlowDataset(Source):
    """A split of a data set, such as ``imdb_reviews``, ``glue/sst2`` or ``imdb_reviews:train[:1000]``."""

    scheme, form = "tfds", "tfds:NAME[/CONFIG][:SPLIT]"

    @cached_property
    def builder(self) -> Any:
        """The data set, prepared as array records; MissingInputError: it does not exist or cannot be prepared."""
        return _find_builder(self.name.partition(":")[0])

    @cached_property
    def _features(self) -> dict[str, Any]:
        features = self.builder.info.features
        if not hasattr(features, "items"):
            raise InputError(f"source {self}: its examples have no named features")
        return dict(features.items())

    def text_column(self) -> str:
        texts = self._text_features()
        usual = [name for name in TEXT_FEATURES if name in texts] or texts
        if usual is texts and len(texts) != 1:
            features = ", ".join(texts) or "none"
            raise InputError(f"source {self}: its text features are {features}; set text_column to one of them")
        return usual[0]

    def class_names(self, column: str) -> tuple[str, ...]:
        return tuple(getattr(self._features.get(column), "names", None) or ())

    def texts(self, column: str | None = None, on_read: OnRead = ignore_bytes) -> Iterator[Pieces]:
        name = self.text_column() if column is None else column
        Row(str(self), dict.fromkeys(self._text_features())).field(name, "text_column")
        return ([row.text(name)] for row in self.rows())  # None comes from a truncated file

    def rows(self, columns: Sequence[str] = (), on_read: OnRead = ignore_bytes) -> Iterator[Row]:
        name, _, split = self.name.partition(":")
        split = split or self.split
        where, builder = f"tfds:{name}:{split}", self.builder
        try:
            examples = builder.as_data_source(split)
            for i in range(len(examples)):
                yield Row(f"{where} example {i}", {key: _as_json(value) for key, value in examples[i].items()})
        except Exception as error:  # its errors have no narrower base
            raise _unavailable(where, error) from error

    def _text_features(self) -> list[str]:
        features = self._features.items()
        return [name for name, feature in features if feature.shape == () and feature.np_dtype == np.object_]


def _find_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    dataset = name.partition("/")[0]

    find = partial(tfds.builder, name, file_format="array_record", data_dir=os.environ.get("TFDS_DATA_DIR"))
    try:
        try:
            builder = find()
        except tfds.core.DatasetNotFoundError:
            for package in _OLD_BUILDERS:  # registered by their import
                importlib.import_module(f"tensorflow_datasets.{package}")
            builder = find()
    except tfds.core.DatasetNotFoundError as error:
        hint = did_you_mean(dataset, tfds.list_builders(with_community_datasets=False), n=3)
        raise MissingInputError(f"tfds:{name}: no such data set{hint}; see tensorflow.org/datasets") from error
    except Exception as error:  # its errors have no narrower base
        if "BuilderConfig" in str(error):
            known = ", ".join(tfds.builder_cls(dataset).builder_configs) or "none"
            raise MissingInputError(f"tfds:{name}: no such configuration; expected one of {known:.300}") from error
        raise _unavailable(f"tfds:{name}", error) from error
    if not (builder.data_path / "dataset_info.json").exists():
        _prepare(builder, name)
    return builder


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    if isinstance(builder, tfds.core.BeamBasedBuilder) and importlib.util.find_spec("apache_beam") is None:
        raise _needs(name, "Apache Beam")
    url = next(iter(builder.url_infos or ()), DOWNLOAD_URL)
    try:
        check_reachable(url, CONNECT_SECONDS)
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except Exception as error:  # its errors have no narrower base
        if isinstance(error, ImportError) and "tensorflow" in str(error):
            raise _needs(name, "TensorFlow") from error
        raise _unavailable(f"tfds:{name}", error, f", or a connection to {urlsplit(url).netloc}") from error


def _needs(name: str, library: str) -> MissingInputError:
    return MissingInputError(
        f"tfds:{name}: only {library} can prepare it, which is not installed; prepare it elsewhere with "
        "tfds build --file_format=array_record and copy it into TFDS_DATA_DIR (default ~/tensorflow_datasets)"
    )


def _unavailable(where: str, error: Exception, alternative: str = "") -> MissingInputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return MissingInputError(
        f"{where}: {reason:.400}; expected array records in TFDS_DATA_DIR (default ~/tensorflow_datasets){alternative}"
    )


def _as_json(value: Any) -> Any:
    """Convert values of TensorFlow Datasets to JSON's types: bytes to text, NumPy's numbers to Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")  # bytes of a picture are never used as text
    if isinstance(value, list | np.ndarray):
        return [_as_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
