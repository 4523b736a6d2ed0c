"""Data sets prepared as TensorFlow Datasets does."""

from pathlib import Path

import pytest

tfds = pytest.importorskip("tensorflow_datasets")


def build(folder: Path, dataset: str, features: dict, splits: dict, version: str = "1.0.0") -> None:
    """Prepare a data set in a folder."""
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name, VERSION = dataset, tfds.core.Version(version)

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, _):
                return {split: self._generate_examples(rows) for split, rows in splits.items()}

            def _generate_examples(self, rows):
                yield from enumerate(rows)

    Builder(data_dir=folder, file_format="array_record").download_and_prepare()
