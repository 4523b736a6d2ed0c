"""Object storage without a network: what fsspec finds under ``gs://`` while a test runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

_FORBIDDEN = "Forbidden: https://storage.example/b/bucket/o\nthe caller does not have storage.objects.create access"


class FakeBucket(MemoryFileSystem):
    """As ``gs://bucket``: objects are written whole, there are no folders, and what is denied is an OSError."""

    protocol, cachable = ("gs", "gcs"), False
    is_denied = False
    sent: list[str]  # names written, in order

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def mv(self, *_, **__):
        raise AssertionError("an object cannot be renamed")

    def _open(self, path, mode="rb", **kwargs):
        assert mode in ("rb", "wb"), "an object cannot be appended to"
        if mode == "wb":
            if self.is_denied:
                raise OSError(_FORBIDDEN)
            self.sent.append(self._strip_protocol(path).removeprefix("/bucket/"))
        return super()._open(path, mode, **kwargs)

    @classmethod
    def objects(cls, folder: str = "") -> dict[str, bytes]:
        """The content of each object below a folder of ``gs://bucket``."""
        start = f"/bucket/{folder}/" if folder else "/bucket/"
        return {name.removeprefix(start): f.getvalue() for name, f in cls.store.items() if name.startswith(start)}

    @classmethod
    def fill(cls, objects: dict[str, bytes]) -> None:
        """Write objects of ``gs://bucket``."""
        for name, content in objects.items():
            cls().pipe_file(f"gs://bucket/{name}", content)
        cls.sent.clear()

    @classmethod
    def drop(cls, start: str) -> None:
        """Remove the objects whose names begin so."""
        for name in [name for name in cls.store if name.startswith(f"/bucket/{start}")]:
            del cls.store[name]


@contextmanager
def fake_bucket() -> Iterator[type[FakeBucket]]:
    """An empty ``gs://bucket``."""
    cls = type("Bucket", (FakeBucket,), {"store": {}, "pseudo_dirs": [""], "sent": []})
    known = {name: _registry.get(name) for name in cls.protocol}
    for name in cls.protocol:
        fsspec.register_implementation(name, cls, clobber=True)
    try:
        yield cls
    finally:
        for name, before in known.items():
            if before is None:
                del _registry[name]
            else:
                fsspec.register_implementation(name, before, clobber=True)
